-- Drops whatever is there, except what writers hold.
-- KEYS[1] entry; ARGV[1] the writer who gives up its hold, or nothing.
local held = redis.call('GET', KEYS[1])
if held and string.sub(held, 1, 3) == 'C\3H' then
  local others = ''
  for at = 85, #held, 16 do
    local owner = string.sub(held, at, at + 15)
    if owner ~= ARGV[1] then others = others .. owner end
  end
  if others ~= '' then
    redis.call('SET', KEYS[1], string.sub(held, 1, 84) .. others, 'KEEPTTL')
    return 0
  end
end
return redis.call('UNLINK', KEYS[1])
