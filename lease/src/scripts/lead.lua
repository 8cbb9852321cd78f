-- Renews what a dispatcher leads and takes what nobody leads, up to its share.
-- ARGV: dispatcher, ttl ms, '1' to take, ms after which what is free is taken
--       beyond the share, pool...
-- Answers: {'1' where an incarnation is in force, dispatchers, share, then for
--          each pool in turn (pool, 'mine', incarnation, counter)
--          | (pool, 'other', dispatcher, ms left) | (pool, 'free')}
-- A term that ran out is never renewed: whoever takes the pool has a new one.
local me, ttl, willing, patience = ARGV[1], tonumber(ARGV[2]), ARGV[3] == '1', tonumber(ARGV[4])
local now, dispatchers, pools = clock(), key('dispatchers'), #ARGV - 4

-- The dead, and those from a time that a clock which was set back has not reached.
redis.call('ZREMRANGEBYSCORE', dispatchers, '-inf', int(now - ttl))
redis.call('ZREMRANGEBYSCORE', dispatchers, '(' .. int(now + ttl), '+inf')
if willing then
  redis.call('ZADD', dispatchers, int(now), me)
else
  redis.call('ZREM', dispatchers, me)
end
local alive = math.max(1, redis.call('ZCARD', dispatchers))
local share = math.ceil(pools / alive)

local held, found = 0, {}
for i = 1, pools do
  local name = key('leader', ARGV[4 + i])
  local v = redis.call('HMGET', name, 'dispatcher', 'incarnation', 'counter', 'until', 'ttl')
  local left = (tonumber(v[4] or nil) or 0) - now
  local most = tonumber(v[5] or nil) or ttl
  if left > most then
    left = most
    redis.call('HSET', name, 'until', int(now + most))
  end
  local one = { name = name, dispatcher = v[1], incarnation = v[2], counter = v[3], left = left }
  one.known = v[4]
  one.live = v[1] and v[2] and v[3] and left > 0
  one.mine = one.live and v[1] == me
  if one.mine then
    held = held + 1
    redis.call('HSET', name, 'until', int(now + ttl), 'ttl', int(ttl))
  end
  found[i] = one
end

local current = in_force()
local answer = { current and '1' or '0', int(alive), int(share) }
for i = 1, pools do
  local one = found[i]
  if not one.live and willing and current and (held < share or (one.known and -one.left >= patience)) then
    local counter = redis.call('INCR', key('terms'))
    if counter >= 4294967295 then return { 'counter_spent' } end
    held = held + 1
    one.mine, one.live, one.incarnation, one.counter = true, true, current, int(counter)
    redis.call('HSET', one.name, 'dispatcher', me, 'incarnation', current, 'counter', one.counter,
      'until', int(now + ttl), 'ttl', int(ttl))
  elseif not one.live and not one.known then
    -- Whoever finds it free for long takes it whatever its share.
    redis.call('HSET', one.name, 'until', int(now))
  end
  table.insert(answer, ARGV[4 + i])
  if one.mine then
    table.insert(answer, 'mine')
    table.insert(answer, one.incarnation)
    table.insert(answer, one.counter)
  elseif one.live then
    table.insert(answer, 'other')
    table.insert(answer, one.dispatcher)
    table.insert(answer, int(one.left))
  else
    table.insert(answer, 'free')
  end
end
return answer
