-- Gives a lease back unused.
-- KEYS[1] entry; ARGV[1] fence.
local head = redis.call('GETRANGE', KEYS[1], 0, 19)
if string.sub(head, 5, 20) ~= ARGV[1] then return 0 end
if string.sub(head, 3, 3) == 'P' then return redis.call('DEL', KEYS[1]) end
-- The fence and the end of the refresh; the value stays.
redis.call('SETRANGE', KEYS[1], 4, string.rep('\0', 16))
redis.call('SETRANGE', KEYS[1], 52, string.rep('\0', 8))
return 1
