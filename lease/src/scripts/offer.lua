-- A worker has sandboxes that are verified clean and idle.
-- ARGV: worker, its incarnation, pool, sandbox...
-- Answers: {'stale', incarnation or ''} | {'unregistered'} | {'ok', newly warm}
-- Repeating it changes nothing. A sandbox with a live lease stays leased: a
-- placement is on its way to it. One whose lease ran out becomes warm again:
-- the placement never came.
local worker, own, pool = ARGV[1], ARGV[2], ARGV[3]
local current = incarnation()
if current ~= own then return { 'stale', current or '' } end
if not redis.call('ZSCORE', key('workers'), worker) then return { 'unregistered' } end
local now, fresh = clock(), 0
for i = 4, #ARGV do
  local id = ARGV[i]
  local record = sandbox_of(id)
  local keep = record and (record.worker ~= worker or leased(record, now)
    or (record.state == 'warm' and record.pool == pool and record.incarnation == own))
  if not keep then
    if record then forget(id, record) end
    redis.call('HSET', key('sandbox', id), 'worker', worker, 'pool', pool, 'state', 'warm',
      'incarnation', own)
    redis.call('SADD', key('held', worker), id)
    redis.call('ZADD', key('warm', pool), int(now), id)
    fresh = fresh + 1
  elseif record.worker == worker and record.state == 'warm' then
    -- A claim that found it under another pool's name may have taken it out.
    redis.call('ZADD', key('warm', pool), 'NX', int(now), id)
  end
end
return { 'ok', int(fresh) }
