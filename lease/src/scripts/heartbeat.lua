-- A worker is alive; what should it do?
-- ARGV: worker, its incarnation, its record (JSON), '1' for the first of its life
-- Answers: {'stale', incarnation or ''}: nothing was written
--          {'ok', incarnation, draining '0'|'1', (pool, 'warm:max', spec as JSON)...}
local worker, own, record, first = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local current = incarnation()
if current ~= own then return { 'stale', current or '' } end
redis.call('ZADD', key('workers'), int(clock()), worker)
redis.call('ZREM', key('dead'), worker)
redis.call('HSET', key('worker', worker), 'record', record, 'incarnation', own)
if first == '1' then redis.call('HDEL', key('worker', worker), 'draining') end
local answer = { 'ok', current, redis.call('HGET', key('worker', worker), 'draining') or '0' }
local targets = redis.call('HGETALL', key('targets', worker))
for i = 1, #targets, 2 do
  local spec = redis.call('HGET', key('pools'), targets[i])
  if spec then
    table.insert(answer, targets[i])
    table.insert(answer, targets[i + 1])
    table.insert(answer, spec)
  end
end
return answer
