-- Puts an incarnation in force where there is none.
-- ARGV: candidate
-- Answers: {in force}
if redis.call('SETNX', key('incarnation'), ARGV[1]) == 1 then
  redis.call('SET', key('counter'), '0')
end
return { incarnation() }
