-- A task has its terminal; its lease goes, or stays as a session's.
-- ARGV: worker, sandbox, incarnation, counter, '1' to keep the lease,
--       life of a finished record ms, tenant or '', task or '',
--       where the task's valid result counts for a group: run, group, how many are asked
--       for, life of the count ms
-- Answers: {'ok', 'enough' or ''} | {'stale', 'enough' or ''}: the lease was not this one any
-- more; enough: the group has as many valid results as were asked for, with this one
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
local enough = ''
if ARGV[9] and ARGV[9] ~= ''
  and vote(tenant, ARGV[9], ARGV[10], task, ARGV[11], ARGV[12]) then enough = 'enough' end
local record = sandbox_of(id)
if record and not holds(record, worker, ARGV[3], ARGV[4]) then refuse('release') end
if not holds(record, worker, ARGV[3], ARGV[4]) then return { 'stale', enough } end
if keep == '1' then
  -- This may come late: the session's next task may be written down already.
  if not record.task or record.task == task then
    redis.call('HDEL', key('sandbox', id), 'task')
    if record.tenant then redis.call('ZREM', key('use', record.tenant, 'running'), id) end
  end
else
  forget(id, record)
end
return { 'ok', enough }
