-- Makes the lock of a live filler last longer.
-- KEYS[1] entry; ARGV[1] fence; ARGV[2] lock in milliseconds.
local head = redis.call('GETRANGE', KEYS[1], 0, 19)
if string.sub(head, 5, 20) ~= ARGV[1] then return 0 end
if string.sub(head, 3, 3) == 'P' then
  return redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('SETRANGE', KEYS[1], 52, struct.pack('<I8', now + ARGV[2]))
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 1
