-- Takes a worker out that is known to be gone, unless it was heard of meanwhile. `reap` tells
-- of it from then on.
-- ARGV: worker, ms that it must have been silent for
-- Answers: {'dead'} | {'alive'} | {'unknown'}
local seen = tonumber(redis.call('ZSCORE', key('workers'), ARGV[1]) or nil)
if not seen then return { 'unknown' } end
if clock() - seen < tonumber(ARGV[2]) then return { 'alive' } end
forget_worker(ARGV[1])
redis.call('ZADD', key('dead'), 0, ARGV[1])
return { 'dead' }
