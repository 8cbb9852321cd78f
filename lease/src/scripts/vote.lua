-- A task's valid result counts for its group: told again, or by somebody who
-- found the terminal of a worker that died before it could.
-- ARGV: tenant, run, group, task, how many are asked for, life of the count ms
-- Answers: {'enough'}: with this one | {'ok'}
if vote(ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]) then return { 'enough' } end
return { 'ok' }
