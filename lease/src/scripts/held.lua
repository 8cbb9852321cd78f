-- What the registry says that one worker has, warm and leased.
-- ARGV: worker
-- Answers: (sandbox, 'warm'|'leased'|'over', incarnation, counter or '0')...
-- 'over' is a lease that ran out. What stands in the worker's set and is not its own is dropped.
local worker, now = ARGV[1], clock()
local answer = {}
for _, id in ipairs(redis.call('SMEMBERS', key('held', worker))) do
  local record = sandbox_of(id)
  if not record or record.worker ~= worker then
    redis.call('SREM', key('held', worker), id)
  else
    local state = 'warm'
    if record.state == 'leased' then state = leased(record, now) and 'leased' or 'over' end
    for _, value in ipairs({ id, state, record.incarnation or '0', record.counter or '0' }) do
      table.insert(answer, value)
    end
  end
end
return answer
