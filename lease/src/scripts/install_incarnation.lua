-- Puts an incarnation in force where there is none, or only one that was put in
-- force before the server was started again. Never an older one.
-- ARGV: candidate
-- Answers: {the newest}
local last = incarnation()
if not in_force() and (not last or tonumber(ARGV[1]) > (tonumber(last) or 0)) then
  redis.call('SET', key('incarnation'), ARGV[1])
  redis.call('SET', key('counter'), '0')
  redis.call('SET', key('server'), server())
end
return { incarnation() }
