-- Replaces what a worker should keep. Configuration, as set_pools.
-- ARGV: worker, (pool, 'warm:max')...
-- Answers: {'ok'} | {'unknown'}
if not redis.call('ZSCORE', key('workers'), ARGV[1]) then return { 'unknown' } end
local targets = key('targets', ARGV[1])
redis.call('DEL', targets)
for i = 2, #ARGV, 2 do redis.call('HSET', targets, ARGV[i], ARGV[i + 1]) end
return { 'ok' }
