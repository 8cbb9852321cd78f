-- A dispatcher leads these pools no more: another one may take them at once.
-- ARGV: dispatcher, '1' where it leaves for good, pool...
-- Answers: {'ok', how many it led}
local now, left = int(clock()), 0
if ARGV[2] == '1' then redis.call('ZREM', key('dispatchers'), ARGV[1]) end
for i = 3, #ARGV do
  local name = key('leader', ARGV[i])
  if redis.call('HGET', name, 'dispatcher') == ARGV[1] then
    redis.call('DEL', name)
    redis.call('HSET', name, 'until', now)
    left = left + 1
  end
end
return { 'ok', int(left) }
