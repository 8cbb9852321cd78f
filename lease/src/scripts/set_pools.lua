-- Replaces the pools. Configuration, not a claim: it holds under any incarnation.
-- ARGV: (pool, spec as JSON)...
-- Answers: {'ok'}
redis.call('DEL', key('pools'))
for i = 1, #ARGV, 2 do redis.call('HSET', key('pools'), ARGV[i], ARGV[i + 1]) end
return { 'ok' }
