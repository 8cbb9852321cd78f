-- Who leads.
-- ARGV: pool...
-- Answers: (pool, dispatcher, incarnation, counter, ms left)... of those that are led
local now, answer = clock(), {}
for _, pool in ipairs(ARGV) do
  local v = redis.call('HMGET', key('leader', pool), 'dispatcher', 'incarnation', 'counter', 'until',
    'ttl')
  local left = (tonumber(v[4] or nil) or 0) - now
  if v[1] and v[2] and v[3] and left > 0 then
    left = math.min(left, tonumber(v[5] or nil) or left)
    for _, value in ipairs({ pool, v[1], v[2], v[3], int(left) }) do table.insert(answer, value) end
  end
end
return answer
