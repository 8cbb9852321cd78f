-- A worker wants an idle sandbox back.
-- ARGV: worker, sandbox
-- Answers: {'gone'}: nobody can be given it | {'leased'}: somebody was
local worker, id = ARGV[1], ARGV[2]
local record = sandbox_of(id)
if not record or record.worker ~= worker then return { 'gone' } end
if leased(record, clock()) then return { 'leased' } end
forget(id, record)
return { 'gone' }
