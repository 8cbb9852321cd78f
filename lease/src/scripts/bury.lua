-- A dead worker's placements are seen to: it need not be told again.
-- ARGV: worker
-- Answers: {'ok'}
redis.call('ZREM', key('dead'), ARGV[1])
return { 'ok' }
