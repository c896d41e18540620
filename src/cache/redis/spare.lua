-- Drops whatever is there, except what another writer holds.
-- KEYS[1] entry; ARGV[1] the owner who may drop a hold of its own, or nothing.
local head = redis.call('GETRANGE', KEYS[1], 0, 19)
if string.sub(head, 1, 3) == 'C\2H' and string.sub(head, 5, 20) ~= ARGV[1] then return 0 end
return redis.call('UNLINK', KEYS[1])
