-- Tells every in-process tier what to forget, in order with what rounds tell them.
-- KEYS[1] control, KEYS[2] the stream of batches; ARGV[1] a list of keys as JSON.
local batch = redis.call('HINCRBY', KEYS[1], 'batch', 1)
local add = function() return redis.pcall('XADD', KEYS[2], 'MAXLEN', '~', 256, batch .. '-0', 'keys', ARGV[1]) end
local added = add()
if type(added) == 'table' and added.err then
  redis.call('DEL', KEYS[2])
  add()
end
return batch
