-- Results are gone.
-- ARGV: tenant/run/task...
-- Answers: {'ok'}
for i = 1, #ARGV do redis.call('ZREM', key('removals'), ARGV[i]) end
return { 'ok' }
