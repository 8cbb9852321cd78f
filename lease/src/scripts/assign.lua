-- A session's next task begins in its sandbox: cancelling finds it by this.
-- ARGV: worker, sandbox, incarnation, counter, tenant, run, task, life of the record ms,
--       group or ''
-- Answers: {'ok'} | {'cancelled', cause} | {'stale'}
local worker, id, tenant, run, task = ARGV[1], ARGV[2], ARGV[5], ARGV[6], ARGV[7]
local record = sandbox_of(id)
if not holds(record, worker, ARGV[3], ARGV[4])
  or not leased(record, clock()) then
  return { 'stale' }
end
local claim = key('task', tenant, task)
redis.call('HSET', key('sandbox', id), 'tenant', tenant, 'run', run, 'task', task, 'attempt', '1')
redis.call('HSET', claim, 'sandbox', id, 'incarnation', ARGV[3], 'counter', ARGV[4])
redis.call('PEXPIRE', claim, ARGV[8])
if ARGV[9] and ARGV[9] ~= '' then redis.call('HSET', key('sandbox', id), 'group', ARGV[9]) end
redis.call('ZADD', key('use', tenant, 'running'), record['until'], id)
local cause = redis.call('HGET', claim, 'cancelled') or stopped(tenant, run, ARGV[9])
if cause then return { 'cancelled', cause } end
return { 'ok' }
