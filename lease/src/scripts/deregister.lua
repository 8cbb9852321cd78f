-- A worker leaves: its inventory and leases go with it.
-- ARGV: worker
-- Answers: {'ok'}
forget_worker(ARGV[1])
redis.call('ZREM', key('dead'), ARGV[1])
return { 'ok' }
