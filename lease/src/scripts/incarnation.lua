-- The incarnation that grants may be made under.
-- Answers: {'in_force', incarnation} | {'none'}
local current = in_force()
if current then return { 'in_force', current } end
return { 'none' }
