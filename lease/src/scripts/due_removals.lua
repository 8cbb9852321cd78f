-- The tasks whose results may go now, the longest due first.
-- ARGV: most
-- Answers: tenant/run/task...
return redis.call('ZRANGEBYSCORE', key('removals'), '-inf', int(clock()), 'LIMIT', 0, ARGV[1])
