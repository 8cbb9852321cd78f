-- What a tenant has now.
-- ARGV: tenant
-- Answers: {sandboxes, running, sessions}
local now = clock()
local answer = {}
for _, what in ipairs({ 'sandboxes', 'running', 'sessions' }) do
  table.insert(answer, int(leases_in(key('use', ARGV[1], what), now)))
end
return answer
