-- Cancels a run, or a group of it: claims and renewals see it.
-- ARGV: tenant, run, group or '', cause, life of the flag ms
-- Answers: {'ok'}
local flag = ARGV[3] == '' and key('stop', ARGV[1], ARGV[2])
  or key('stop', ARGV[1], ARGV[2], ARGV[3])
redis.call('SET', flag, ARGV[4], 'PX', ARGV[5])
return { 'ok' }
