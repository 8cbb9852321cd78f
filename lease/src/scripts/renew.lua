-- Renews leases of one worker.
-- ARGV: worker, ttl ms, (sandbox, incarnation, counter)...
-- Answers: for each sandbox in turn 'lost', 'held', or 'held:<task>:<cause>' where
-- the task is cancelled; the task is empty where a session of a cancelled run or
-- group waits for its next one
local worker, ttl, now = ARGV[1], tonumber(ARGV[2]), clock()
local answer = {}
for i = 3, #ARGV, 3 do
  local id = ARGV[i]
  local record = sandbox_of(id)
  if not holds(record, worker, ARGV[i + 1], ARGV[i + 2]) or not leased(record, now) then
    if record and not holds(record, worker, ARGV[i + 1], ARGV[i + 2]) then refuse('renewal') end
    table.insert(answer, 'lost')
  else
    redis.call('HSET', key('sandbox', id), 'until', int(now + ttl))
    count_lease(id, record, int(now + ttl))
    local cause = record.tenant and record.task
      and redis.call('HGET', key('task', record.tenant, record.task), 'cancelled')
    if not cause and record.tenant and record.run then
      cause = stopped(record.tenant, record.run, record.group)
      -- A session whose group has results enough may still be looked at.
      if cause and not record.task and string.sub(cause, 1, 6) == 'enough' then cause = nil end
    end
    table.insert(answer, cause and 'held:' .. (record.task or '') .. ':' .. cause or 'held')
  end
end
return answer
