-- Moves the watermark, if this is still the memory that was looked at and nobody moved it since.
-- KEYS[1] control, KEYS[2] the stream of batches; ARGV[1] n, ARGV[2] run id, ARGV[3] replication id, ARGV[4] what this
-- round invalidated, empty for nothing, ARGV[5] the epoch that was looked at, ARGV[6] when that was by this server's clock,
-- ARGV[7] how long ago that is at least, in milliseconds, ARGV[8…] fields and values for the control key.
if (redis.call('HGET', KEYS[1], 'n') or '0') ~= ARGV[1] or (redis.call('HGET', KEYS[1], 'epoch') or '0') ~= ARGV[5] then
  return 'overtaken'
end
local time = redis.call('TIME')
if time[1] * 1000 + math.ceil(time[2] / 1000) - ARGV[6] < tonumber(ARGV[7]) then return 'the clock was set back' end
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
local info = redis.call('INFO', 'replication')
if run ~= ARGV[2] or string.match(info, 'master_replid:(%w+)') ~= ARGV[3] or not string.find(info, 'role:master', 1, true) then
  return 'changed'
end
redis.call('HSET', KEYS[1], 'n', ARGV[1] + 1, 'run', ARGV[2], 'replication', ARGV[3], unpack(ARGV, 8))
if ARGV[4] ~= '' then
  local batch = redis.call('HINCRBY', KEYS[1], 'batch', 1)
  local add = function() return redis.pcall('XADD', KEYS[2], 'MAXLEN', '~', 256, batch .. '-0', 'keys', ARGV[4]) end
  local added = add()
  if type(added) == 'table' and added.err then
    -- What is there is further than this: it was another life's.
    redis.call('DEL', KEYS[2])
    add()
  end
end
return 'moved'
