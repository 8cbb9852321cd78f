-- A task has its terminal; its lease goes, or stays as a session's.
-- ARGV: worker, sandbox, incarnation, counter, '1' to keep the lease,
--       life of a finished record ms, tenant or '', task or ''
-- Answers: {'ok'} | {'stale'}: the lease was not this one any more
local worker, id, keep, tenant, task = ARGV[1], ARGV[2], ARGV[5], ARGV[7], ARGV[8]
if task ~= '' then
  local claim = key('task', tenant, task)
  local fields = redis.call('HMGET', claim, 'sandbox', 'incarnation', 'counter')
  if fields[1] == id and fields[2] == ARGV[3] and fields[3] == ARGV[4] then
    redis.call('HDEL', claim, 'sandbox', 'nonce', 'incarnation', 'counter', 'cancelled')
    redis.call('HSET', claim, 'finished', '1')
    redis.call('PEXPIRE', claim, ARGV[6])
  end
end
local record = sandbox_of(id)
if not holds(record, worker, ARGV[3], ARGV[4]) then return { 'stale' } end
if keep == '1' then
  redis.call('HDEL', key('sandbox', id), 'task')
else
  forget(id, record)
end
return { 'ok' }
