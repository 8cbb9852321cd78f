-- A task has ended whose results are not to be kept: notes when they may go.
-- ARGV: tenant, run, task, ms from now
-- Answers: {'ok'}
local name = table.concat({ ARGV[1], ARGV[2], ARGV[3] }, '/')
redis.call('ZADD', key('removals'), 'NX', int(clock() + tonumber(ARGV[4])), name)
return { 'ok' }
