-- Gives a claim back whose placement could not be published.
-- ARGV: tenant, task, sandbox, incarnation, counter, nonce,
--       '1' where the server refused the placement: it is stored nowhere
-- Answers: {'ok'} | {'stale'}
-- The placement may be on its way all the same, so the sandbox does not become
-- warm here: the lease runs out now, and the worker offers the sandbox again
-- when it is idle. The attempt stays counted, for the placement may be stored,
-- unless it was refused.
local tenant, task, id, own, counter, nonce = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local record = sandbox_of(id)
if not record or record.state ~= 'leased' or record.nonce ~= nonce or record.task ~= task
  or record.tenant ~= tenant or record.incarnation ~= own or record.counter ~= counter then
  return { 'stale' }
end
redis.call('HSET', key('sandbox', id), 'until', '0')
discount_lease(id, record)
local claim = key('task', tenant, task)
local fields = redis.call('HMGET', claim, 'nonce', 'counter')
if fields[1] == nonce and fields[2] == counter then
  redis.call('HDEL', claim, 'sandbox', 'nonce', 'incarnation', 'counter')
  if ARGV[7] == '1' then redis.call('HINCRBY', claim, 'attempts', -1) end
end
return { 'ok' }
