-- Asks for the right to fill an entry that a plain SET NX did not get.
-- KEYS[1] entry; ARGV[1] the pending value to write; ARGV[2] lock in milliseconds; ARGV[3] when the entry was
-- stored that counts as past its TTL though it is fresh, or 0.
-- Answers {verdict} or {verdict, value}: fill, wait, hit, past.
local function fill()
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  return {'fill'}
end
local held = redis.call('GET', KEYS[1])
-- Absent, another format, or another key's value: as good as nothing.
if not held or #held < 84 or string.sub(held, 1, 2) ~= string.sub(ARGV[1], 1, 2)
  or string.sub(held, 29, 36) ~= string.sub(ARGV[1], 29, 36) then
  return fill()
end
local state = string.sub(held, 3, 3)
-- Where the server forgets its scripts between two commands of a batch, those that ran are sent again with those that did not.
local own = string.sub(held, 5, 20) == string.sub(ARGV[1], 5, 20)
if state == 'P' then return {own and 'fill' or 'wait'} end
if state ~= 'V' then return {'past'} end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if string.sub(held, 21, 28) ~= string.sub(ARGV[1], 21, 28) then
  -- While a rolling update runs two shapes, they must not fight over a hot key: a young value of the other is left alone.
  -- One of the same shape is from before a purge.
  if string.sub(held, 77, 80) ~= string.sub(ARGV[1], 77, 80) and now - struct.unpack('<I8', held, 45) < 1000 then return {'past'} end
  return fill()
end
if struct.unpack('<I8', held, 37) > now and struct.unpack('<I8', held, 45) ~= tonumber(ARGV[3]) then return {'hit', held} end
if struct.unpack('<I8', held, 53) > now and not own then return {'wait', held} end
redis.call('SETRANGE', KEYS[1], 4, string.sub(ARGV[1], 5, 20))
redis.call('SETRANGE', KEYS[1], 52, struct.pack('<I8', now + ARGV[2]))
-- For as long as the refresh may come, the fence is there.
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return {'fill', held}
