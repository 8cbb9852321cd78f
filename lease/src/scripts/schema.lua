-- The schema versions of workers that the fleet takes; sets them where they are given.
-- ARGV: none, or 'oldest:newest'
-- Answers: {'range', 'oldest:newest' or ''}
if ARGV[1] and redis.call('GET', key('schema')) ~= ARGV[1] then
  redis.call('SET', key('schema'), ARGV[1])
end
return { 'range', redis.call('GET', key('schema')) or '' }
