-- Claims a warm sandbox of a pool for one attempt at a task.
-- ARGV: tenant, run, task, pool, request digest, most attempts, nonce, ttl ms,
--       life of the task's record ms, '1' to claim a finished task again,
--       group or '', '1' for a session, then what the tenant may have at once, each a number
--       or '': sandboxes, running tasks, sessions
-- Answers: {'granted', sandbox, worker, incarnation, counter, attempt}
--          {'none_warm'} | {'busy', ms that the other lease has left}
--          {'cancelled', cause} | {'finished'} | {'exhausted', attempts}
--          {'over_quota', 'sandboxes'|'running'|'sessions', limit, current}
--          {'conflict', digest of the first} | {'no_incarnation'} | {'counter_spent'}
-- The same nonce gets the same grant for as long as it holds.
local tenant, run, task, pool, digest = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local most, nonce, ttl = tonumber(ARGV[6]), ARGV[7], tonumber(ARGV[8])
local current = in_force()
if not current then return { 'no_incarnation' } end
local now = clock()
local record = key('task', tenant, task)
local fields = redis.call('HMGET', record, 'digest', 'attempts', 'cancelled', 'finished',
  'sandbox', 'nonce', 'incarnation', 'counter')
local attempts = tonumber(fields[2] or nil) or 0
if fields[1] and fields[1] ~= digest then return { 'conflict', fields[1] } end
if fields[3] then return { 'cancelled', fields[3] } end
if fields[4] and ARGV[10] ~= '1' then return { 'finished' } end
local group, session = ARGV[11] or '', ARGV[12] == '1'
local cause = stopped(tenant, run, group)
if cause then return { 'cancelled', cause } end
if fields[5] then
  local held = sandbox_of(fields[5])
  if held and held.task == task and held.tenant == tenant and leased(held, now)
    and held.incarnation == fields[7] and held.counter == fields[8]
    and alive(held.worker, now, ttl) then
    if fields[6] == nonce then
      return { 'granted', fields[5], held.worker, held.incarnation, held.counter, int(attempts) }
    end
    return { 'busy', int(tonumber(held['until']) - now) }
  end
  -- The lease ran out or its worker did: whoever still renews it must lose.
  if held and held.task == task and held.tenant == tenant and held.state == 'leased' then
    forget(fields[5], held)
  end
end
if attempts >= most then return { 'exhausted', int(attempts) } end

-- Whatever stands in the inventory and cannot be handed out is dropped: a
-- worker that is well offers its idle sandboxes again.
local function pick()
  local warm = key('warm', pool)
  for _ = 1, 1000 do
    local id = redis.call('ZRANGE', warm, 0, 0)[1]
    if not id then return nil end
    redis.call('ZREM', warm, id)
    local found = sandbox_of(id)
    if found and found.state == 'warm' and found.pool == pool then
      if found.incarnation == current and alive(found.worker, now, ttl)
        and redis.call('HGET', key('worker', found.worker), 'draining') ~= '1' then
        return id, found.worker
      end
      forget(id, found)
    end
  end
end

if (tonumber(redis.call('GET', key('counter')) or nil) or 0) >= 4294967295 then
  return { 'counter_spent' }
end
-- Leases are counted where they are made: two dispatchers cannot both give
-- the last one.
local function full(what, limit)
  if not limit or limit == '' then return nil end
  local current = leases_in(key('use', tenant, what), now)
  if current >= tonumber(limit) then return { 'over_quota', what, limit, int(current) } end
end

local over = (session and full('sessions', ARGV[15])) or full('sandboxes', ARGV[13])
  or full('running', ARGV[14])
if over then return over end
local id, worker = pick()
if not id then return { 'none_warm' } end
local counter = int(redis.call('INCR', key('counter')))
attempts = attempts + 1
redis.call('HSET', key('sandbox', id), 'state', 'leased', 'incarnation', current,
  'counter', counter, 'until', int(now + ttl), 'tenant', tenant, 'run', run, 'task', task,
  'attempt', int(attempts), 'nonce', nonce)
if group ~= '' then redis.call('HSET', key('sandbox', id), 'group', group) end
if session then redis.call('HSET', key('sandbox', id), 'session', '1') end
count_lease(id, { pool = pool, tenant = tenant, task = task, session = session }, int(now + ttl))
redis.call('HDEL', record, 'finished')
redis.call('HSET', record, 'digest', digest, 'attempts', int(attempts), 'sandbox', id,
  'nonce', nonce, 'incarnation', current, 'counter', counter)
redis.call('PEXPIRE', record, ARGV[9])
return { 'granted', id, worker, current, counter, int(attempts) }
