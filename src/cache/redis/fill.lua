-- Stores a value if the fence of its lease is still there.
-- KEYS[1] entry; ARGV[1] fence; ARGV[2] value; ARGV[3] life in milliseconds.
local head = redis.call('GETRANGE', KEYS[1], 0, 19)
if head == '' then return 'gone' end
if string.sub(head, 5, 20) ~= ARGV[1] then return 'fenced' end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 'stored'
