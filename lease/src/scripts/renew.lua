-- Renews leases of one worker.
-- ARGV: worker, ttl ms, (sandbox, incarnation, counter)...
-- Answers: for each sandbox in turn 'lost', 'held', or 'held:<task>' where the
-- task is cancelled
local worker, ttl, now = ARGV[1], tonumber(ARGV[2]), clock()
local answer = {}
for i = 3, #ARGV, 3 do
  local id = ARGV[i]
  local record = sandbox_of(id)
  if not holds(record, worker, ARGV[i + 1], ARGV[i + 2]) or not leased(record, now) then
    table.insert(answer, 'lost')
  else
    redis.call('HSET', key('sandbox', id), 'until', int(now + ttl))
    local cancelled = record.tenant and record.task
      and redis.call('HGET', key('task', record.tenant, record.task), 'cancelled')
    table.insert(answer, cancelled and 'held:' .. record.task or 'held')
  end
end
return answer
