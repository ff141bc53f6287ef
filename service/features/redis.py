"""Users, items and live histories from Redis: one round trip a look-up.

A look-up sends one script and one MGET at once. The script returns all that must be read at one moment: whether Redis
holds the whole bundle, the users, the deletions, the likes, the outcomes, the live counts, and the beginnings of the
records of items in histories. The MGET returns the candidates that this process does not hold. The script makes keys
out of what it reads, so this needs one Redis or a replicated one, not a cluster.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha1
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from models.features import HistoryItem, UserFeatures
from models.fusion import Counts
from service.features.cache import ItemCache
from service.features.codec import Codec, RecordError
from service.features.keys import DELETED, LIKES, OUTCOMES, BundleKeys
from service.features.protocol import Features, Query, StoreHealth
from service.interactions.counts import NOTHING_COUNTED, Counted
from service.interactions.live import NAME_DIGITS, USERS_AT_ONCE, KnownOutcome, Like, LiveUser
from service.metrics.store import FallbackReason

# KEYS: meta, deletions, prefixes of likes, items, users, tables of counts, outcomes. ARGV: the bundle's id, d_collab,
# the number of users; for each user the id and 1 if the stored history is wanted; then the items whose counts are
# wanted. The offsets are the codec's.
_LOOK_UP = """
local meta = redis.call('HMGET', KEYS[1], 'bundle_id', 'complete', 'counts')
if meta[1] ~= ARGV[1] or meta[2] ~= '1' then return {0} end
local d_collab = tonumber(ARGV[2])
local users, items, counted, seen = {}, {}, {}, {}
local behind = 3 + 2 * tonumber(ARGV[3])

local function counts(of, id)
  if not meta[3] then return {} end
  return redis.call('HMGET', KEYS[6] .. meta[3] .. of .. id, 'impressions', 'positives')
end

local function width(flags)
  if flags < 2 then return 4 * d_collab end
  return 2 * d_collab
end

local function want(id)
  if seen[id] then return end
  seen[id] = true
  local key = KEYS[4] .. id
  local head = redis.call('GETRANGE', key, 0, 15)
  if #head == 0 then return end
  local flags, _, title = struct.unpack('<BI2I4', head, 2)
  items[#items + 1] = id
  items[#items + 1] = redis.call('GETRANGE', key, 0, 15 + width(flags) + title)
end

local function history(record)
  local flags, likes = struct.unpack('<BI2', record, 2)
  local at = 17 + 8 * likes
  if flags % 2 == 1 then at = at + width(flags) end
  for _ = 1, likes do
    local length = struct.unpack('<I2', record, at)
    want(string.sub(record, at + 2, at + 1 + length))
    at = at + 2 + length
  end
end

for place = 4, behind, 2 do
  local id, wanted = ARGV[place], ARGV[place + 1] == '1'
  local deleted = redis.call('HGET', KEYS[2], id)
  local record = redis.call('GET', KEYS[5] .. id)
  -- A record ends in the time of the user's first row. What is from before the deletion is not used.
  if deleted and record and (#record < 8 or struct.unpack('<d', record, #record - 7) <= tonumber(deleted)) then
    record = false
  end
  local likes = {}
  if wanted then
    if record then history(record) end
    likes = redis.call('ZRANGE', KEYS[3] .. id, 0, -1, 'WITHSCORES')
    for one = 1, #likes, 2 do want(string.match(likes[one], '([^%z]*)$')) end
  end
  local outcomes = redis.call('ZRANGE', KEYS[7] .. id, 0, -1, 'WITHSCORES')
  users[#users + 1] = {record, deleted, likes, counts(':u:', id), outcomes}
end
for place = behind + 1, #ARGV do counted[#counted + 1] = counts(':i:', ARGV[place]) end
return {1, users, items, counted, meta[3]}
"""
_SHA = sha1(_LOOK_UP.encode()).hexdigest()  # Redis's name of the script; no secret hangs on it


class LookUpError(Exception):
    """Redis did not answer a look-up so that it could be used; `reason` says why."""

    def __init__(self, reason: FallbackReason, message: str) -> None:
        super().__init__(message)
        self.reason: FallbackReason = reason


class RedisStore:
    """A `FeatureStore` of one published bundle. Holds nothing but its cache: the client is the process's."""

    def __init__(self, client: Redis, bundle_id: str, codec: Codec, cache: ItemCache) -> None:
        self._client = client
        self.bundle_id = bundle_id
        self._keys = BundleKeys(bundle_id)
        self._codec = codec
        self._cache = cache

    async def look_up(self, bundle_id: str, query: Query) -> Features:
        """Return everything that the query names and Redis knows.

        Raises:
            KeyError: the query is for another bundle.
            LookUpError: there is no answer, or none that can be used.
        """
        if bundle_id != self.bundle_id:
            raise KeyError(f"this store is of bundle {self.bundle_id[:12]}, not {bundle_id[:12]}")
        items, missing = self._cache.find(bundle_id, query.item_ids)
        user_ids = sorted(query.user_ids | query.histories_of)
        with _look_up_errors():
            counts_of = sorted(query.counts_of)
            told, records = await self._ask(user_ids, query.histories_of, counts_of, missing)
            if told[0] != 1:
                raise LookUpError("bundle_missing", f"Redis does not hold the whole of bundle {bundle_id[:12]}")
            asked = {
                one: None if record is None else self._codec.decode_item(one, record)
                for one, record in zip(missing, records, strict=True)
            }
            self._cache.put(bundle_id, asked)
            items.update((one, item) for one, item in asked.items() if item is not None)
            users, live = await self._users(user_ids, query.histories_of, told[1])
            counted = NOTHING_COUNTED  # a bundle that was published without a table of counts
            if told[4] is not None:
                users_told = [counts for *_, counts, _ in told[1]]
                counted = Counted(True, counts_told(user_ids, users_told), counts_told(counts_of, told[3]))
            return Features(users, items, live, self._history_items(told[2]), counted)

    async def _ask(
        self, user_ids: Sequence[str], histories_of: frozenset[str], counts_of: Sequence[str], item_ids: Sequence[str]
    ) -> tuple[list[Any], list[bytes | None]]:
        """Send script and MGET at once; a Redis that has lost the script gets it and is asked again."""
        try:
            return await self._send(user_ids, histories_of, counts_of, item_ids)
        except NoScriptError:
            await self._client.script_load(_LOOK_UP)
            return await self._send(user_ids, histories_of, counts_of, item_ids)

    async def _send(
        self, user_ids: Sequence[str], histories_of: frozenset[str], counts_of: Sequence[str], item_ids: Sequence[str]
    ) -> tuple[list[Any], list[bytes | None]]:
        keys = self._keys
        asked = [part for one in user_ids for part in (one, int(one in histories_of))]
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.evalsha(
                _SHA,
                7,
                *(keys.meta, DELETED, LIKES, keys.items, keys.users, keys.counts, OUTCOMES),
                *(self.bundle_id, self._codec.d_collab, len(user_ids), *asked, *counts_of),
            )
            if item_ids:
                prefix = keys.items.encode()
                pipe.mget([prefix + one.encode() for one in item_ids])
            told, *rest = await pipe.execute()
        return told, rest[0] if rest else []

    async def _users(
        self, user_ids: Sequence[str], histories_of: frozenset[str], told: Sequence[Any]
    ) -> tuple[dict[str, UserFeatures], dict[str, LiveUser]]:
        users: dict[str, UserFeatures] = {}
        live: dict[str, LiveUser] = {}
        for number, (user_id, (record, deleted, likes, _, outcomes)) in enumerate(zip(user_ids, told, strict=True), 1):
            if record is not None:
                users[user_id] = self._codec.decode_user(user_id, record)
            if deleted is not None or outcomes or user_id in histories_of:
                live[user_id] = LiveUser(
                    _likes(likes), None if deleted is None else float(deleted), _outcomes(outcomes)
                )
            if number % USERS_AT_ONCE == 0:
                await asyncio.sleep(0)
        return users, live

    def _history_items(self, told: Sequence[bytes]) -> Mapping[str, HistoryItem]:
        ids = [one.decode() for one in told[::2]]
        return {one: self._codec.decode_history_part(one, part) for one, part in zip(ids, told[1::2], strict=True)}

    async def check(self) -> str:
        """Return what Redis holds of the bundle, in words.

        Raises:
            LookUpError: it does not answer, or does not hold the whole bundle.
        """
        with _look_up_errors():
            names = ("bundle_id", "complete", "users", "items", "precision")
            found, complete, *told = await self._client.hmget(self._keys.meta, names)
            users, items, precision = map(_text, told)
        if found != self.bundle_id.encode() or complete != b"1":
            raise LookUpError("bundle_missing", f"Redis does not hold the whole of bundle {self.bundle_id[:12]}")
        return f"redis: {users} users, {items} items in {precision}"

    async def health(self) -> StoreHealth:
        """Return whether Redis answers and holds the bundle."""
        try:
            return StoreHealth(True, await self.check())
        except LookUpError as error:
            return StoreHealth(False, str(error))

    def forget(self) -> None:
        """Free the bundle's items: it is no longer served."""
        self._cache.forget(self.bundle_id)


@contextmanager
def _look_up_errors() -> Iterator[None]:
    """Raise as LookUpError what can go wrong between asking Redis and understanding it."""
    try:
        yield
    except RedisTimeoutError as error:
        raise LookUpError("timeout", "Redis does not answer in time") from error
    except (RedisConnectionError, OSError) as error:
        raise LookUpError("down", f"Redis cannot be reached: {error}") from error
    except (RedisError, RecordError) as error:
        raise LookUpError("error", f"what Redis answers cannot be used: {error}") from error
    except ValueError as error:  # text or numbers that are none; the message may quote them
        raise LookUpError("error", f"what Redis answers cannot be used: {type(error).__name__}") from error


def _text(value: bytes | str | None) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def counts_told(ids: Sequence[str], told: Sequence[Sequence[bytes | None]]) -> dict[str, Counts]:
    """Return counts by id from the numbers that Redis returned, without ids that were never counted."""
    counts = {}
    for one, (shown, liked) in zip(ids, told, strict=True):
        positives = max(0, int(liked or 0))
        if shown is not None or positives:
            # After a deletion a user's positives can exceed the impressions: the deletion removes earlier impressions.
            counts[one] = Counts(max(positives, int(shown or 0)), positives)
    return counts


def _likes(told: Sequence[bytes]) -> tuple[Like, ...]:
    likes = []
    for member, time_ in zip(told[::2], told[1::2], strict=True):
        event_id, _, item_id = member.decode().rpartition("\0")
        likes.append(Like(float(time_), event_id, item_id))
    return tuple(sorted(likes))


def _outcomes(told: Sequence[bytes]) -> tuple[KnownOutcome, ...]:
    outcomes = []
    for member, shown in zip(told[::2], told[1::2], strict=True):
        text = member.decode()
        name, positive, item_id = text[:NAME_DIGITS], text.startswith("y", NAME_DIGITS), text[NAME_DIGITS + 1 :]
        outcomes.append(KnownOutcome(float(shown), name, item_id, positive))
    return tuple(outcomes)
