-- A worker is alive; what should it do?
-- ARGV: worker, its incarnation, its record (JSON), '1' for the first of its life, ttl ms
-- Answers: {'stale', incarnation or ''} | {'schema', oldest, newest}: nothing was written
--          {'taken', '', process}: another process is this worker, and alive; nothing was written
--          {'ok', incarnation, draining '0'|'1', (pool, 'warm:max', spec as JSON)...}
-- A worker whose schema version the fleet does not take (any more) is refused at its first
-- heartbeat and told to leave at a later one: it may have work in hand.
local worker, own, record, first = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local oldest, newest = string.match(redis.call('GET', key('schema')) or '', '^(%d+):(%d+)$')
local read, said = pcall(cjson.decode, record)
local version = read and type(said) == 'table' and tonumber(said.schema)
local taken = not oldest or not version
  or (version >= tonumber(oldest) and version <= tonumber(newest))
if first == '1' and not taken then return { 'schema', oldest, newest } end
local process = read and type(said) == 'table'
  and tostring(said.host) .. '/' .. tostring(said.pid) or ''
local known = redis.call('HGET', key('worker', worker), 'process')
if known and known ~= process and alive(worker, clock(), tonumber(ARGV[5])) then
  refuse('heartbeat')
  return { 'taken', '', known }
end
local current = incarnation()
if current ~= own then return { 'stale', current or '' } end
redis.call('ZADD', key('workers'), int(clock()), worker)
redis.call('ZREM', key('dead'), worker)
redis.call('HSET', key('worker', worker), 'record', record, 'incarnation', own,
  'process', process)
if first == '1' then redis.call('HDEL', key('worker', worker), 'draining') end
if not taken then redis.call('HSET', key('worker', worker), 'draining', '1') end
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
