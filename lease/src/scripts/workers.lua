-- All workers.
-- ARGV: ttl in ms
-- Answers: (worker, ms since it was heard of, alive '0'|'1', draining '0'|'1', record as JSON)...
local now, ttl = clock(), tonumber(ARGV[1])
local answer = {}
local all = redis.call('ZRANGE', key('workers'), 0, -1, 'WITHSCORES')
for i = 1, #all, 2 do
  local worker, seen = all[i], tonumber(all[i + 1]) or 0
  local fields = redis.call('HMGET', key('worker', worker), 'draining', 'record')
  table.insert(answer, worker)
  table.insert(answer, int(math.max(0, now - seen)))
  table.insert(answer, now - seen < ttl and '1' or '0')
  table.insert(answer, fields[1] or '0')
  table.insert(answer, fields[2] or '')
end
return answer
