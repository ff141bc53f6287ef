"""Interactions that several servers share, in Redis: likes, counts and deletions.

Every step says what shall be, not what shall be added, so that what comes twice, late or from another server changes
nothing. The rules are those of each server's own log: an impression has one like, its earliest positive event.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from service.features.keys import (
    APPLIED,
    BUNDLE_DIGITS,
    BUNDLES,
    DELETED,
    IMPRESSION,
    ITEM_COUNTS,
    LIKES,
    USER_COUNTS,
)
from service.interactions.event import LogEntry
from service.interactions.live import MAX_LIKES
from service.interactions.shared import SharedStoreError

# KEYS: applied, deletions, bundles. ARGV: log id, last seq, likes kept, seconds that things are kept, digits of a
# bundle id in a key, four prefixes (likes, user counts, item counts, impressions), the last seq that must be applied
# already (empty: any), then seven an entry: kind, event, user, item, label (empty, 0 or 1), time, impression. An
# impression's state is p, n or y and the time of the latest entry about it; behind a space stand time and event of its
# like, if it has one.
_APPLY = """
local kept, retention, digits = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local likes, user_counts, item_counts, impressions = ARGV[6], ARGV[7], ARGV[8], ARGV[9]

local function forget(user, moment)
  local before = redis.call('HGET', KEYS[2], user)
  if before and tonumber(before) >= tonumber(moment) then return end
  redis.call('HSET', KEYS[2], user, moment)
  redis.call('ZREMRANGEBYSCORE', likes .. user, '-inf', moment)
  redis.call('DEL', user_counts .. user)
  for _, bundle in ipairs(redis.call('SMEMBERS', KEYS[3])) do
    redis.call('DEL', 'sella:' .. string.sub(bundle, 1, digits) .. ':u:' .. user)
  end
end

local function count(key, impression, positive)
  if impression > 0 then redis.call('HINCRBY', key, 'impressions', impression) end
  if positive > 0 then redis.call('HINCRBY', key, 'positives', positive) end
  redis.call('EXPIRE', key, retention)
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

local function advance(kind, event, user, item, label, moment, impression)
  local deleted = redis.call('HGET', KEYS[2], user)
  if deleted and tonumber(moment) <= tonumber(deleted) then return end
  local key = impressions .. redis.sha1hex(impression)
  local told = redis.call('GET', key)
  local state, latest, old, whole = 'p', moment, '', true
  if told then
    local split = string.find(told, ' ', 1, true)
    state, latest, old = string.sub(told, 1, 1), string.sub(told, 2, split - 1), string.sub(told, split + 1)
    if deleted and tonumber(latest) <= tonumber(deleted) then
      -- All of it was before the deletion: new for the user, while the item keeps what was counted.
      state, latest, old, whole = 'p', moment, '', state == 'p'
    elseif tonumber(moment) > tonumber(latest) then latest = moment end
  end
  local after = state
  if label == '1' then after = 'y'
  elseif (label == '0' or kind == 'expiry') and state == 'p' then after = 'n' end
  local seen = (state == 'p' and after ~= 'p') and 1 or 0
  local positive = (state ~= 'y' and after == 'y') and 1 or 0
  if label == '1' then old = like(user, item, event, moment, old) end
  redis.call('SET', key, after .. latest .. ' ' .. old, 'EX', retention)
  if seen + positive > 0 then
    count(user_counts .. user, seen, positive)
    if whole then count(item_counts .. item, seen, positive) end
  end
end

if ARGV[10] ~= '' and (redis.call('HGET', KEYS[1], ARGV[1]) or '0') ~= ARGV[10] then
  return redis.error_reply('ELSEWHERE the log has been applied to another place since')
end
for place = 11, #ARGV, 7 do
  local kind = ARGV[place]
  if kind == 'deletion' then forget(ARGV[place + 2], ARGV[place + 5])
  else advance(kind, unpack(ARGV, place + 1, place + 6)) end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
"""


@dataclass(frozen=True, slots=True)
class SharedCounts:
    """How often a user saw items or an item was shown, and how often that was liked."""

    impressions: int
    positives: int


class RedisInteractions:
    """`SharedInteractions` in Redis. The client is the process's.

    Likes, counts and the states of impressions are kept `retention_s` after the last change; the log's own retention,
    so that nothing that is replayed can be counted a second time. Deletions are kept for good.
    """

    def __init__(self, client: Redis, retention_s: float) -> None:
        self._client = client
        self._retention_s = max(1, round(retention_s))
        self._script = client.register_script(_APPLY)

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
        numbers = (entries[-1].seq, MAX_LIKES, self._retention_s, BUNDLE_DIGITS)
        prefixes = (LIKES, USER_COUNTS, ITEM_COUNTS, IMPRESSION)
        expected = "" if after is None else str(after)
        arguments = [part for entry in entries for part in _fields(entry)]
        try:
            await self._script([APPLIED, DELETED, BUNDLES], [log_id, *numbers, *prefixes, expected, *arguments])
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

    async def counts(
        self, user_ids: Iterable[str], item_ids: Iterable[str]
    ) -> tuple[dict[str, SharedCounts], dict[str, SharedCounts]]:
        """Return the counts of users and of items in one round trip; those never counted are missing.

        Raises:
            SharedStoreError: Redis does not answer.
        """
        users, items = list(user_ids), list(item_ids)
        if not users and not items:
            return {}, {}
        try:
            async with self._client.pipeline(transaction=False) as pipe:
                for key in (*(USER_COUNTS + one for one in users), *(ITEM_COUNTS + one for one in items)):
                    pipe.hmget(key, ["impressions", "positives"])
                told = await pipe.execute()
        except (RedisError, OSError) as error:
            raise SharedStoreError(f"Redis does not tell counts: {error}") from error
        return _counts(users, told[: len(users)]), _counts(items, told[len(users) :])


def _fields(entry: LogEntry) -> tuple[str, ...]:
    one = entry.interaction
    label = "" if one.label is None else str(int(one.label))
    return entry.kind, one.event_id, one.user_id, one.item_id, label, repr(float(one.timestamp)), one.impression_id


def _counts(ids: Sequence[str], told: Sequence[Sequence[bytes | None]]) -> dict[str, SharedCounts]:
    rows = zip(ids, told, strict=True)
    return {one: SharedCounts(int(shown or 0), int(liked or 0)) for one, (shown, liked) in rows if shown is not None}


async def _value(reply: Any) -> Any:
    """Wait for a reply: redis-py's annotations leave open whether a command's is awaited."""
    return await reply
