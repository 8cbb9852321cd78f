-- Flags a task as cancelled and says where it runs.
-- ARGV: tenant, task, ttl ms, life of a record that only says cancelled, in ms
-- Answers: {'finished'} | {'unplaced'} | {'placed', sandbox, worker, incarnation, counter}
local tenant, task, now = ARGV[1], ARGV[2], clock()
local claim = key('task', tenant, task)
local fields = redis.call('HMGET', claim, 'finished', 'sandbox', 'incarnation', 'counter')
if fields[1] then return { 'finished' } end
local known = redis.call('EXISTS', claim) == 1
redis.call('HSET', claim, 'cancelled', 'asked')
if not known then redis.call('PEXPIRE', claim, ARGV[4]) end
if fields[2] then
  local record = sandbox_of(fields[2])
  if record and record.task == task and record.tenant == tenant and leased(record, now)
    and record.incarnation == fields[3] and record.counter == fields[4]
    and alive(record.worker, now, tonumber(ARGV[3])) then
    return { 'placed', fields[2], record.worker, fields[3], fields[4] }
  end
end
return { 'unplaced' }
