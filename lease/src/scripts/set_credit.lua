-- Keeps the pools' last credits, for people.
-- ARGV: (pool, credit as JSON)...
-- Answers: {'ok'}
for i = 1, #ARGV, 2 do redis.call('HSET', key('credit'), ARGV[i], ARGV[i + 1]) end
return { 'ok' }
