-- Warm sandboxes of each pool.
-- Answers: (pool, count)...
local answer = {}
for _, pool in ipairs(redis.call('HKEYS', key('pools'))) do
  table.insert(answer, pool)
  table.insert(answer, int(redis.call('ZCARD', key('warm', pool))))
end
return answer
