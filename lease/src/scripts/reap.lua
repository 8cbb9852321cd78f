-- Finds workers that are not heard of any more and takes them out.
-- ARGV: ttl ms, ms until a worker that is not buried is told again
-- Answers: worker...
local now, ttl, again = clock(), tonumber(ARGV[1]), tonumber(ARGV[2])
local gone = redis.call('ZRANGEBYSCORE', key('workers'), '-inf', int(now - ttl), 'LIMIT', 0, 16)
for _, worker in ipairs(gone) do
  forget_worker(worker)
  redis.call('ZADD', key('dead'), 0, worker)
end
local told = redis.call('ZRANGEBYSCORE', key('dead'), '-inf', int(now), 'LIMIT', 0, 64)
for _, worker in ipairs(told) do redis.call('ZADD', key('dead'), int(now + again), worker) end
return told
