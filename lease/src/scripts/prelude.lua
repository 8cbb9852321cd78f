-- Stands before every script. KEYS[1] is the root that all keys begin with;
-- src/keys.rs says what each holds. Answers are lists of text: the first says
-- which answer it is.
local root = KEYS[1]

local function key(...)
  return root .. ':' .. table.concat({ ... }, ':')
end

-- Redis prints large numbers as floats; ids of milliseconds must not be.
local function int(number)
  return string.format('%.0f', number)
end

-- Milliseconds by the server's clock: the only one that all parties share.
local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function incarnation()
  return redis.call('GET', key('incarnation')) or nil
end

-- Which process answers. One that was started again may have lost what was
-- written last, and with it a counter that was given out.
local function server()
  local info = redis.pcall('INFO', 'server')
  return type(info) == 'string' and string.match(info, 'run_id:(%w+)') or ''
end

-- The incarnation that grants may be made under: it was put in force in this
-- process, so that its counter only ever went up.
local function in_force()
  local current = incarnation()
  if current and redis.call('GET', key('server')) == server() then return current end
  return nil
end

-- Whether a worker has been heard of within `ttl` ms.
local function alive(worker, now, ttl)
  local seen = tonumber(redis.call('ZSCORE', key('workers'), worker) or nil)
  return seen ~= nil and now - seen < ttl
end

-- A sandbox's record as a table; `nil` where there is none.
local function sandbox_of(id)
  local names = {
    'worker', 'pool', 'state', 'incarnation', 'counter', 'until', 'tenant', 'task', 'nonce',
    'run', 'group', 'session',
  }
  local values = redis.call('HMGET', key('sandbox', id), unpack(names))
  if not values[1] then return nil end
  local record = {}
  for i, name in ipairs(names) do record[name] = values[i] or nil end
  return record
end

-- Counts what was refused: somebody acts for whom it is not.
local function refuse(what)
  redis.call('HINCRBY', key('refused'), what, 1)
end

-- Whether a record is a lease that has not run out.
local function leased(record, now)
  return record.state == 'leased' and (tonumber(record['until']) or 0) > now
end

local function holds(record, worker, epoch_incarnation, epoch_counter)
  return record ~= nil and record.worker == worker and record.state == 'leased'
    and record.incarnation == epoch_incarnation and record.counter == epoch_counter
end

-- Counts a lease for its pool and its tenant until it ends. The counts are
-- sorted by that time, so that a lease that ran out counts for nothing.
local function count_lease(id, record, ends)
  redis.call('ZADD', key('leased', record.pool or ''), ends, id)
  if not record.tenant then return end
  redis.call('ZADD', key('use', record.tenant, 'sandboxes'), ends, id)
  if record.task then
    redis.call('ZADD', key('use', record.tenant, 'running'), ends, id)
  else
    redis.call('ZREM', key('use', record.tenant, 'running'), id)
  end
  if record.session then redis.call('ZADD', key('use', record.tenant, 'sessions'), ends, id) end
end

local function discount_lease(id, record)
  redis.call('ZREM', key('leased', record.pool or ''), id)
  if not record.tenant then return end
  for _, what in ipairs({ 'sandboxes', 'running', 'sessions' }) do
    redis.call('ZREM', key('use', record.tenant, what), id)
  end
end

-- How many leases a count has now.
local function leases_in(count, now)
  redis.call('ZREMRANGEBYSCORE', count, '-inf', int(now))
  return redis.call('ZCARD', count)
end

-- Why tasks of a run, or of a group of it, must not go on; nil where they may.
local function stopped(tenant, run, group)
  local flags = { key('stop', tenant, run) }
  if group and group ~= '' then flags[2] = key('stop', tenant, run, group) end
  local causes = redis.call('MGET', unpack(flags))
  return causes[1] or causes[2] or nil
end

-- A task of a group has ended with a valid result. With as many as are asked
-- for the group is stopped; true where this one did it.
local function vote(tenant, run, group, task, need, life)
  local valid, stop = key('valid', tenant, run, group), key('stop', tenant, run, group)
  redis.call('SADD', valid, task)
  redis.call('PEXPIRE', valid, life)
  if redis.call('SCARD', valid) < tonumber(need) then return false end
  local first = redis.call('SET', stop, 'enough-' .. need, 'NX', 'PX', life)
  redis.call('PEXPIRE', stop, life)
  return first ~= false
end

-- Takes a sandbox out of everything.
local function forget(id, record)
  discount_lease(id, record)
  redis.call('DEL', key('sandbox', id))
  redis.call('ZREM', key('warm', record.pool or ''), id)
  redis.call('SREM', key('held', record.worker), id)
end

-- Takes a worker, its inventory and its leases out of everything.
local function forget_worker(worker)
  for _, id in ipairs(redis.call('SMEMBERS', key('held', worker))) do
    local record = sandbox_of(id)
    if record and record.worker == worker then forget(id, record) end
  end
  redis.call('DEL', key('held', worker), key('worker', worker), key('targets', worker))
  redis.call('ZREM', key('workers'), worker)
end

