-- Puts a writer's hold in place of whatever is there, beside those of others.
-- KEYS[1] entry; ARGV[1] a value with this writer as its only holder; ARGV[2] life in milliseconds.
local held = redis.call('GET', KEYS[1])
local life = tonumber(ARGV[2])
local value = ARGV[1]
if held and string.sub(held, 1, 3) == 'C\3H' then
  for at = 85, #held, 16 do
    local owner = string.sub(held, at, at + 15)
    if owner ~= string.sub(ARGV[1], 85, 100) then value = value .. owner end
  end
  life = math.max(life, redis.call('PTTL', KEYS[1]))
end
redis.call('SET', KEYS[1], value, 'PX', life)
