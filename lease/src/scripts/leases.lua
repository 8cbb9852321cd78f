-- The leases of one worker.
-- ARGV: worker
-- Answers: (sandbox, pool, incarnation, counter, ms left, tenant, run, task or '', attempt)...
local worker, now = ARGV[1], clock()
local answer = {}
for _, id in ipairs(redis.call('SMEMBERS', key('held', worker))) do
  local v = redis.call('HMGET', key('sandbox', id), 'worker', 'pool', 'state', 'incarnation',
    'counter', 'until', 'tenant', 'run', 'task', 'attempt')
  if v[1] == worker and v[3] == 'leased' then
    local left = int(math.max(0, (tonumber(v[6] or nil) or 0) - now))
    for _, value in ipairs({ id, v[2] or '', v[4] or '', v[5] or '', left, v[7] or '', v[8] or '',
      v[9] or '', v[10] or '' }) do
      table.insert(answer, value)
    end
  end
end
return answer
