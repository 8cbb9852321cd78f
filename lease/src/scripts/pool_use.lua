-- What each pool has: warm sandboxes, and leased ones.
-- Answers: (pool, warm, leased)...
local now = clock()
local answer = {}
for _, pool in ipairs(redis.call('HKEYS', key('pools'))) do
  table.insert(answer, pool)
  table.insert(answer, int(redis.call('ZCARD', key('warm', pool))))
  table.insert(answer, int(leases_in(key('leased', pool), now)))
end
return answer
