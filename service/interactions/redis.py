"""Interactions that several servers share, in Redis: likes, outcomes, counts and deletions.

Every step says what shall be, not what shall be added, so that what comes twice, late or from another server changes
nothing. The rules are those of each server's own log: an impression has one like, its earliest positive event.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from models.features import MAX_OUTCOMES
from service.features.keys import (
    APPLIED,
    BUNDLE_DIGITS,
    BUNDLES,
    DELETED,
    IMPRESSION,
    LIKES,
    OUTCOMES,
    BundleKeys,
)
from service.features.redis import counts_told
from service.interactions.counts import Counted
from service.interactions.event import LogEntry
from service.interactions.live import MAX_LIKES, NAME_DIGITS
from service.interactions.shared import CountTable, Impression, SharedStoreError

# The beginning of all three scripts. KEYS[2], KEYS[3]: deletions, bundles. ARGV: log id, seconds to keep keys, digits
# of a bundle id in a key, prefix of impressions.
#
# An impression's value holds its state (p, n or y) and the time of the latest entry about it, the time when it was
# shown, the numbers of the tables that have counted it, and after a space the time and event of its like, if any. So
# the value says which tables have counted the impression, and nothing counts twice, however often servers send it.
_IMPRESSIONS = """
local retention, digits, impressions = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local bundles, tables = {}, {}
for _, bundle in ipairs(redis.call('SMEMBERS', KEYS[3])) do
  local prefix = 'sella:' .. string.sub(bundle, 1, digits) .. ':'
  bundles[#bundles + 1] = prefix
  local told = redis.call('HMGET', prefix .. 'meta', 'counts', 'counted_until', 'expires_at')
  if told[1] then
    tables[#tables + 1] = {
      prefix = prefix .. 'n:' .. told[1], number = told[1], since = tonumber(told[2]),
      ends = told[3] and math.floor(tonumber(told[3])) + 1
    }
  end
end

local function add(counts, of, id, seen, positive)
  if seen == 0 and positive == 0 then return end
  local key = counts.prefix .. of .. id
  if seen ~= 0 then redis.call('HINCRBY', key, 'impressions', seen) end
  if positive ~= 0 then redis.call('HINCRBY', key, 'positives', positive) end
  if counts.ends then redis.call('EXPIREAT', key, counts.ends) else redis.call('EXPIRE', key, retention) end
end

local function read(key)
  local told = redis.call('GET', key)
  if not told then return nil end
  local state, latest, shown, numbers, liked = string.match(told, '^(%a)([^,]*),([^,]*),([^ ]*) (.*)$')
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

local function before_deletion(user, moment)
  local deleted = redis.call('HGET', KEYS[2], user)
  return deleted and tonumber(moment) <= tonumber(deleted)
end
"""

# KEYS: applied, deletions, bundles. ARGV from the fifth on: last seq, likes kept, prefix of likes, outcomes kept,
# prefix of outcomes, digits of an impression's name, the last seq that must be applied already (empty: any), then seven
# an entry: kind, event, user, item, label (empty, 0 or 1), time, impression.
#
# A member of a user's outcomes is the impression's name, its state (n or y) and the item.
_APPLY = (
    _IMPRESSIONS
    + """
local kept, likes = tonumber(ARGV[6]), ARGV[7]
local outcomes_kept, outcomes, name_digits = tonumber(ARGV[8]), ARGV[9], tonumber(ARGV[10])

local function forget(user, moment)
  local before = redis.call('HGET', KEYS[2], user)
  if before and tonumber(before) >= tonumber(moment) then return end
  redis.call('HSET', KEYS[2], user, moment)
  redis.call('ZREMRANGEBYSCORE', likes .. user, '-inf', moment)
  redis.call('ZREMRANGEBYSCORE', outcomes .. user, '-inf', moment)
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

local function like(user, item, event, moment, old)
  local key = likes .. user
  if old ~= '' then
    local split = string.find(old, ' ', 1, true)
    local time, name = tonumber(string.sub(old, 1, split - 1)), string.sub(old, split + 1)
    if time < tonumber(moment) or (time == tonumber(moment) and name <= event) then return old end
    redis.call('ZREM', key, name .. '\\0' .. item)
  end
  redis.call('ZADD', key, moment, event .. '\\0' .. item)
  redis.call('ZREMRANGEBYRANK', key, 0, -1 - kept)
  redis.call('EXPIRE', key, retention)
  return moment .. ' ' .. event
end

local function outcome(user, item, one, name)
  if one.state == 'p' or before_deletion(user, one.shown) then return end
  local key = outcomes .. user
  if one.state == 'y' then redis.call('ZREM', key, name .. 'n' .. item) end
  redis.call('ZADD', key, one.shown, name .. one.state .. item)
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

local function advance(kind, event, user, item, label, moment, impression)
  if before_deletion(user, moment) then return end
  local hash = redis.sha1hex(impression)
  local key = impressions .. hash
  local one = read(key) or {state = 'p', latest = moment, shown = moment, counted = {}, like = ''}
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
  outcome(user, item, one, string.sub(hash, 1, name_digits))
  count(user, item, one, was, anew)
  write(key, one, 'EX', retention)
end

if ARGV[11] ~= '' and (redis.call('HGET', KEYS[1], ARGV[1]) or '0') ~= ARGV[11] then
  return redis.error_reply('ELSEWHERE the log has been applied to another place since')
end
for place = 12, #ARGV, 7 do
  local kind = ARGV[place]
  if kind == 'deletion' then forget(ARGV[place + 2], ARGV[place + 5])
  else advance(kind, unpack(ARGV, place + 1, place + 6)) end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[5])
"""
)

# Counts for one table the impressions that were applied before the table began. ARGV from the fifth on: the table's
# number, 1 if this is the last part of the log, then three for each impression: user, item, impression.
_FILL = (
    _IMPRESSIONS
    + """
for _, counts in ipairs(tables) do
  if counts.number == ARGV[5] then
    for place = 7, #ARGV, 3 do
      local user, item, key = ARGV[place], ARGV[place + 1], impressions .. redis.sha1hex(ARGV[place + 2])
      local one = read(key)
      if one and one.state ~= 'p' and not one.counted[counts.number] and tonumber(one.shown) > counts.since
        and not before_deletion(user, one.latest) then
        local liked = (one.state == 'y') and 1 or 0
        add(counts, ':u:', user, 1, liked)
        add(counts, ':i:', item, 1, liked)
        one.counted[counts.number] = true
        write(key, one, 'KEEPTTL')
      end
    end
    if ARGV[6] == '1' and not counts.ends then redis.call('HSET', counts.prefix .. ':filled', ARGV[1], 1) end
  end
end
"""
)

# Returns the tables that lack this log's earlier entries: the number, and the end of the bundle's own counts.
_UNFILLED = (
    _IMPRESSIONS
    + """
local found = {}
for _, counts in ipairs(tables) do
  if not counts.ends and redis.call('HEXISTS', counts.prefix .. ':filled', ARGV[1]) == 0 then
    found[#found + 1] = counts.number
    found[#found + 1] = tostring(counts.since)
  end
end
return found
"""
)


_KEYS = (APPLIED, DELETED, BUNDLES)


class RedisInteractions:
    """`SharedInteractions` in Redis. The client is the process's.

    Likes, outcomes, counts and the states of impressions are kept `retention_s` after the last change; the log's own
    retention, so that nothing that is replayed can be counted a second time. Deletions are kept for good.
    """

    def __init__(self, client: Redis, retention_s: float) -> None:
        self._client = client
        self._retention_s = max(1, round(retention_s))
        self._apply, self._fill, self._unfilled = map(client.register_script, (_APPLY, _FILL, _UNFILLED))

    async def applied(self, log_id: str) -> int:
        """Return the `seq` of the last entry of a log that was applied; 0 for none.

        Raises:
            SharedStoreError: Redis does not answer.
        """
        try:
            return int(await _value(self._client.hget(APPLIED, log_id)) or 0)
        except (RedisError, OSError, ValueError) as error:
            raise SharedStoreError(f"Redis does not tell what it has of the log: {error}") from error

    async def apply(self, log_id: str, entries: Sequence[LogEntry], after: int | None = None) -> None:
        """Apply entries in one script, which runs whole or not at all.

        Raises:
            SharedStoreError: Redis does not answer, or refuses, or `after` is given and not what was applied last.
        """
        if not entries:
            return
        kept = (MAX_LIKES, LIKES, MAX_OUTCOMES, OUTCOMES, NAME_DIGITS)
        told = (entries[-1].seq, *kept, "" if after is None else after)
        arguments = [part for entry in entries for part in _fields(entry)]
        try:
            await self._apply(_KEYS, [*self._common(log_id), *told, *arguments])
        except (RedisError, OSError) as error:
            raise SharedStoreError(f"Redis does not take interactions: {error}") from error

    async def deletions(self) -> Mapping[str, float]:
        """Return when each deleted user was deleted, UTC seconds.

        Raises:
            SharedStoreError: Redis does not answer.
        """
        try:
            told = await _value(self._client.hgetall(DELETED))
            return {user_id.decode(): float(moment) for user_id, moment in told.items()}
        except (RedisError, OSError) as error:
            raise SharedStoreError(f"Redis does not tell who was deleted: {error}") from error
        except ValueError as error:  # the message may quote a user's id
            raise SharedStoreError(f"Redis does not tell who was deleted: {DELETED} holds no times") from error

    async def unfilled(self, log_id: str) -> tuple[CountTable, ...]:
        """Return the tables of counts that lack the entries of a log that were applied before the tables began.

        Raises:
            SharedStoreError: Redis does not answer.
        """
        try:
            told = await self._unfilled(_KEYS, self._common(log_id))
            rows = zip(told[::2], told[1::2], strict=True)
            return tuple(CountTable(number.decode(), float(since)) for number, since in rows)
        except (RedisError, OSError, ValueError) as error:
            raise SharedStoreError(f"Redis does not tell which counts it lacks: {error}") from error

    async def fill(self, log_id: str, table: CountTable, impressions: Sequence[Impression], *, last: bool) -> None:
        """Count impressions in a table that has not counted them; `last` marks the last part of the log.

        Raises:
            SharedStoreError: Redis does not answer, or refuses.
        """
        arguments = [part for one in impressions for part in (one.user_id, one.item_id, one.impression_id)]
        try:
            await self._fill(_KEYS, [*self._common(log_id), table.number, int(last), *arguments])
        except (RedisError, OSError) as error:
            raise SharedStoreError(f"Redis does not take counts: {error}") from error

    async def counts(self, bundle_id: str, user_ids: Iterable[str], item_ids: Iterable[str]) -> Counted:
        """Return the servers' shared live counts of users and items, since the end of a published bundle's own counts.

        Raises:
            SharedStoreError: Redis does not answer.
        """
        users, items, keys = list(user_ids), list(item_ids), BundleKeys(bundle_id)
        try:
            table = keys.counts + (await _value(self._client.hget(keys.meta, "counts")) or b"").decode()
            async with self._client.pipeline(transaction=False) as pipe:
                for key in (*(f"{table}:u:{one}" for one in users), *(f"{table}:i:{one}" for one in items)):
                    pipe.hmget(key, ["impressions", "positives"])
                told = await pipe.execute()
        except (RedisError, OSError) as error:
            raise SharedStoreError(f"Redis does not tell counts: {error}") from error
        return Counted(True, counts_told(users, told[: len(users)]), counts_told(items, told[len(users) :]))

    def _common(self, log_id: str) -> tuple[str, int, int, str]:
        return log_id, self._retention_s, BUNDLE_DIGITS, IMPRESSION


def _fields(entry: LogEntry) -> tuple[str, ...]:
    one = entry.interaction
    label = "" if one.label is None else str(int(one.label))
    return entry.kind, one.event_id, one.user_id, one.item_id, label, repr(float(one.timestamp)), one.impression_id


async def _value(reply: Any) -> Any:
    """Wait for a reply: redis-py's annotations leave open whether a command's is awaited."""
    return await reply
