-- Marks a worker as leaving: nothing of it is handed out any more.
-- ARGV: worker, '0'|'1'
-- Answers: {'ok'} | {'unknown'}
if not redis.call('ZSCORE', key('workers'), ARGV[1]) then return { 'unknown' } end
redis.call('HSET', key('worker', ARGV[1]), 'draining', ARGV[2])
return { 'ok' }
