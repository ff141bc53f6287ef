"""The scripts by which servers change what they share in Redis; each runs whole or not at all.

An impression's value holds its state (p, n or y) and the time of the latest entry about it, the time when it was shown,
the numbers of the tables that have counted it, and after a space the time and event of its like, if any. It is kept for
about the attribution window. Later the state is taken from the user's newest outcomes, or from what the log that tells
of it knew before. Such an impression was counted by every table that the log's earlier entries are counted in.

A key that holds another type, or a number that is none, is damaged: it is begun anew, so that it costs itself alone.
"""

HASH_DIGITS = 20  # of an impression's key: there are many, and a shorter key takes an eighth less memory
FILLED_S = 120  # how long an impression that was filled in is remembered, for other servers that fill it in too

# KEYS: applied, deletions, bundles, numbers of deletions, number of tables. ARGV: log id, seconds to keep keys, seconds
# to keep impressions, likes and outcomes kept, digits of a bundle's id in a key, digits of an impression's name, what
# all keys begin with, prefixes of impressions, likes and outcomes.
_SHARED = (
    f"""
local log, retention, remembered = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local likes_kept, outcomes_kept, name_digits = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[7])
local impressions, likes, outcomes = ARGV[9], ARGV[10], ARGV[11]
local FILLED_S, HASH_DIGITS = {FILLED_S}, {HASH_DIGITS}
"""
    + """
local function run(command, key, ...)
  local reply = redis.pcall(command, key, ...)
  if type(reply) ~= 'table' or not reply.err then return reply end
  if string.find(reply.err, 'WRONGTYPE', 1, true) then redis.call('DEL', key)
  elseif string.find(reply.err, 'not an integer', 1, true) then redis.call('HDEL', key, (...)) end
  return redis.call(command, key, ...)
end

local bundles, tables = {}, {}
for _, bundle in ipairs(run('SMEMBERS', KEYS[3])) do
  local prefix = ARGV[8] .. ':' .. string.sub(bundle, 1, tonumber(ARGV[6])) .. ':'
  bundles[#bundles + 1] = prefix
  local told = run('HMGET', prefix .. 'meta', 'counts', 'counted_until', 'ends')
  if told[1] and tonumber(told[2]) then
    tables[#tables + 1] = {
      meta = prefix .. 'meta', all = prefix .. 'n:', prefix = prefix .. 'n:' .. told[1], number = told[1],
      since = tonumber(told[2]), until_ = told[2], ends = told[3] and math.floor(tonumber(told[3]))
    }
  end
end

local function filled(counts)
  if not counts.filled then counts.filled = run('HGET', counts.prefix .. ':filled', log) or '' end
  return counts.filled
end

local function add(counts, of, id, seen, positive)
  if seen == 0 and positive == 0 then return end
  local key = counts.prefix .. of .. id
  if seen ~= 0 then run('HINCRBY', key, 'impressions', seen) end
  if positive ~= 0 then run('HINCRBY', key, 'positives', positive) end
  if counts.ends then redis.call('EXPIREAT', key, counts.ends) else redis.call('EXPIRE', key, retention) end
end

local function read(key)
  local told = run('GET', key)
  local state, latest, shown, numbers, liked = string.match(told or '', '^([pny])([^,]*),([^,]*),([^ ]*) (.*)$')
  if not (tonumber(latest) and tonumber(shown)) then return nil end
  local counted = {}
  for number in string.gmatch(numbers, '[^.]+') do counted[number] = true end
  return {state = state, latest = latest, shown = shown, counted = counted, like = liked}
end

local function write(key, one, ...)
  local numbers = {}
  for _, counts in ipairs(tables) do
    if one.counted[counts.number] then numbers[#numbers + 1] = counts.number end
  end
  local value = one.state .. one.latest .. ',' .. one.shown .. ',' .. table.concat(numbers, '.') .. ' ' .. one.like
  redis.call('SET', key, value, ...)
end

-- An impression whose key has ended, or that is new: its state from the user's outcomes, or `state` and `shown`, which
-- a log knew before ('' for nothing).
local function recall(user, item, impression, name, moment, state, shown)
  for _, known in ipairs({'n', 'y'}) do
    local at = run('ZSCORE', outcomes .. user, name .. known .. item)
    if at then
      if state ~= 'y' then state = known end
      if shown == '' or tonumber(at) < tonumber(shown) then shown = at end
    end
  end
  if state == '' then return {state = 'p', latest = moment, shown = moment, counted = {}, like = ''} end
  local one = {state = state, latest = shown, shown = shown, counted = {}, like = ''}
  if state == 'p' then return one end
  for _, counts in ipairs(tables) do
    local told = filled(counts)
    local passed = told == '1' or (told ~= '' and impression <= string.sub(told, 2))
    one.counted[counts.number] = passed and tonumber(shown) > counts.since
  end
  return one
end

local function before_deletion(user, moment)
  local deleted = tonumber(run('HGET', KEYS[2], user) or '')
  return deleted and tonumber(moment) <= deleted
end

-- The number grows with time also where Redis has lost the numbers before it: no server has seen a greater one.
local function number(user)
  local last, now = run('ZREVRANGE', KEYS[4], 0, 0, 'WITHSCORES'), redis.call('TIME')
  local next = math.max((tonumber(last[2] or '') or 0) + 1, now[1] * 1000000 + now[2])
  run('ZADD', KEYS[4], string.format('%.0f', next), user)
end

local function forget(user, moment)
  local before = tonumber(run('HGET', KEYS[2], user) or '')
  if before and before >= tonumber(moment) then
    if not run('ZSCORE', KEYS[4], user) then number(user) end
    return
  end
  run('HSET', KEYS[2], user, moment)
  number(user)
  run('ZREMRANGEBYSCORE', likes .. user, '-inf', moment)
  run('ZREMRANGEBYSCORE', outcomes .. user, '-inf', moment)
  for _, prefix in ipairs(bundles) do
    local key = prefix .. 'u:' .. user
    -- A record ends in the time of the user's first row: a bundle that learned only from later rows keeps the user.
    local since = redis.pcall('GETRANGE', key, -8, -1)
    if type(since) ~= 'string' or #since < 8 or struct.unpack('<d', since) <= tonumber(moment) then
      redis.call('DEL', key)
    end
  end
  for _, counts in ipairs(tables) do redis.call('DEL', counts.prefix .. ':u:' .. user) end
end
"""
)

# ARGV from the twelfth on: epoch, last seq, the last seq that must be applied already (empty: any), 1 if nothing of the
# log was applied before, then ten an entry: kind, event, user, item, label (empty, 0 or 1), time, impression; and what
# the log knew of the impression before: state, time shown, like (each empty for nothing).
#
# A member of a user's outcomes is the impression's name, its state (n or y) and the item.
APPLY = (
    _SHARED
    + """
local function like(user, item, event, moment, old)
  local key = likes .. user
  local split = string.find(old, ' ', 1, true)
  local time = split and tonumber(string.sub(old, 1, split - 1))
  if time then
    local name = string.sub(old, split + 1)
    if time < tonumber(moment) or (time == tonumber(moment) and name < event) then return old end
    run('ZREM', key, name .. '\\0' .. item)
  end
  run('ZADD', key, moment, event .. '\\0' .. item)
  redis.call('ZREMRANGEBYRANK', key, 0, -1 - likes_kept)
  redis.call('EXPIRE', key, retention)
  return moment .. ' ' .. event
end

local function outcome(user, item, one, name)
  if one.state == 'p' or before_deletion(user, one.shown) then return end
  local key = outcomes .. user
  if one.state == 'y' then run('ZREM', key, name .. 'n' .. item) end
  run('ZADD', key, one.shown, name .. one.state .. item)
  redis.call('ZREMRANGEBYRANK', key, 0, -1 - outcomes_kept)
  redis.call('EXPIRE', key, retention)
end

local function count(user, item, one, was, anew)
  for _, counts in ipairs(tables) do
    local before = one.counted[counts.number] and 1 or 0
    local after = (one.state ~= 'p' and tonumber(one.shown) > counts.since) and 1 or 0
    local liked_before = (was == 'y') and before or 0
    local liked = (one.state == 'y') and after or 0
    if anew then
      add(counts, ':u:', user, after, liked)
    else
      add(counts, ':u:', user, after - before, liked - liked_before)
      add(counts, ':i:', item, after - before, liked - liked_before)
    end
    one.counted[counts.number] = after == 1
  end
end

local function advance(kind, event, user, item, label, moment, impression, known, known_shown, known_like)
  if before_deletion(user, moment) then return end
  local hash = redis.sha1hex(impression)
  local key, name = impressions .. string.sub(hash, 1, HASH_DIGITS), string.sub(hash, 1, name_digits)
  local one = read(key) or recall(user, item, impression, name, moment, known, known_shown)
  if one.like == '' then one.like = known_like end
  local was, anew = one.state, false
  if before_deletion(user, one.latest) then
    -- All entries were before the deletion: the impression is new for the user; the item keeps its counts.
    anew = one.state ~= 'p'
    one.state, one.latest, one.shown, one.like = 'p', moment, moment, ''
  end
  if tonumber(moment) > tonumber(one.latest) then one.latest = moment end
  if tonumber(moment) < tonumber(one.shown) then one.shown = moment end
  if label == '1' then one.state = 'y'
  elseif (label == '0' or kind == 'expiry') and one.state == 'p' then one.state = 'n' end
  if label == '1' then one.like = like(user, item, event, moment, one.like) end
  outcome(user, item, one, name)
  count(user, item, one, was, anew)
  write(key, one, 'EX', remembered)
end

if ARGV[14] ~= '' and (run('HGET', KEYS[1], ARGV[12]) or '0') ~= ARGV[14] then
  return redis.error_reply('ELSEWHERE the log has been applied to another place since')
end
if redis.call('EXISTS', KEYS[1]) == 0 then
  -- How far logs were applied is lost, and they are all applied anew: what they have counted must not count again.
  for _, counts in ipairs(tables) do
    if run('HLEN', counts.prefix .. ':filled') > 0 then
      local begun = tostring(run('INCR', KEYS[5]))
      run('HSET', counts.meta, 'counts', begun, 'stale', 1)
      counts.number, counts.prefix, counts.filled = begun, counts.all .. begun, nil
    end
  end
end
if ARGV[15] == '1' then
  for _, counts in ipairs(tables) do
    if not counts.ends then run('HSET', counts.prefix .. ':filled', log, '1') end
  end
end
for place = 16, #ARGV, 10 do
  local kind = ARGV[place]
  if kind == 'deletion' then forget(ARGV[place + 2], ARGV[place + 5])
  else advance(kind, unpack(ARGV, place + 1, place + 9)) end
end
run('HSET', KEYS[1], ARGV[12], ARGV[13])
"""
)

# Counts for one table the impressions that were applied before the table began. ARGV from the twelfth on: the table's
# number, the last impression that was filled in, 1 if this is the last part of the log, then five for each impression:
# user, item, impression, state, time shown. `filled` has 1 for a log that is complete, else c and the last impression.
FILL = (
    _SHARED
    + """
for _, counts in ipairs(tables) do
  if counts.number == ARGV[12] then
    local done = filled(counts)
    if done == '1' then return end
    if string.sub(done, 2) ~= ARGV[13] then
      return redis.error_reply('ELSEWHERE another part of the log was filled in since')
    end
    for place = 15, #ARGV, 5 do
      local user, item, impression, shown = ARGV[place], ARGV[place + 1], ARGV[place + 2], ARGV[place + 4]
      local hash = redis.sha1hex(impression)
      local key, keep = impressions .. string.sub(hash, 1, HASH_DIGITS), {'KEEPTTL'}
      local one = read(key)
      if not one then
        one = recall(user, item, impression, string.sub(hash, 1, name_digits), shown, ARGV[place + 3], shown)
        keep = {'EX', math.min(FILLED_S, remembered)}
      end
      if one.state ~= 'p' and not one.counted[counts.number] and tonumber(one.shown) > counts.since
        and not before_deletion(user, one.latest) then
        local liked = (one.state == 'y') and 1 or 0
        add(counts, ':u:', user, 1, liked)
        add(counts, ':i:', item, 1, liked)
        one.counted[counts.number] = true
        write(key, one, unpack(keep))
      end
      done = 'c' .. impression
    end
    if ARGV[14] == '1' then done = '1' end
    if not counts.ends and done ~= '' then run('HSET', counts.prefix .. ':filled', log, done) end
  end
end
"""
)

# ARGV from the twelfth on: the log's epochs. Returns the tables that lack this log's earlier entries: the number, the
# end of the bundle's own counts, the last impression filled in, and the places of the epochs when the table began; none
# if these are not known.
UNFILLED = (
    _SHARED
    + """
local found = {}
for _, counts in ipairs(tables) do
  if not counts.ends and filled(counts) ~= '1' then
    local key, begun = counts.prefix .. ':begun', {}
    if #ARGV >= 12 and redis.call('EXISTS', key) == 1 then begun = run('HMGET', key, unpack(ARGV, 12)) end
    found[#found + 1] = {counts.number, counts.until_, string.sub(filled(counts), 2), begun}
  end
end
return found
"""
)

# ARGV from the twelfth on: user and time of each deletion.
FORGET = (
    _SHARED
    + """
for place = 12, #ARGV, 2 do forget(ARGV[place], ARGV[place + 1]) end
"""
)

# Numbers deletions that are not numbered. KEYS: numbers of deletions. ARGV: users.
INDEX = """
local last, now = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES'), redis.call('TIME')
local next = math.max(tonumber(last[2] or '0') + 1, now[1] * 1000000 + now[2])
for place, user in ipairs(ARGV) do redis.call('ZADD', KEYS[1], 'NX', string.format('%.0f', next + place), user) end
"""

# Returns how many keys were evicted since this was asked last by any server, and how many users have no likes although
# they were not deleted. KEYS: evictions known, deletions. ARGV: the run of Redis, keys that it has evicted, prefix of
# likes, then users who have likes in a log.
LOST = """
local run, count = string.match(redis.call('GET', KEYS[1]) or '', '^(%S+) (%d+)$')
local before = run == ARGV[1] and tonumber(count) or 0
if run ~= ARGV[1] or before ~= tonumber(ARGV[2]) then redis.call('SET', KEYS[1], ARGV[1] .. ' ' .. ARGV[2]) end
local gone = 0
for place = 4, #ARGV do
  if redis.call('EXISTS', ARGV[3] .. ARGV[place]) == 0 and redis.call('HEXISTS', KEYS[2], ARGV[place]) == 0 then
    gone = gone + 1
  end
end
return {math.max(0, tonumber(ARGV[2]) - before), gone}
"""
