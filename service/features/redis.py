"""Users, items and live histories from Redis: one round trip a look-up.

A look-up sends one script and one MGET at once. The script returns all that must be read at one moment: whether Redis
holds the whole bundle, the users, the deletions, the likes, the outcomes, the live counts, and the beginnings of the
records of items in histories. The MGET returns the candidates that this process does not hold. The script makes keys
out of what it reads, so this needs one Redis or a replicated one, not a cluster.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha1
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from models.features import HistoryItem, UserFeatures
from models.fusion import Counts
from service.features.cache import ItemCache
from service.features.codec import Codec, RecordError
from service.features.keys import BUNDLE_DIGITS, Keys
from service.features.protocol import Features, Query, StoreHealth
from service.interactions.counts import NOTHING_COUNTED, Counted
from service.interactions.live import NAME_DIGITS, USERS_AT_ONCE, KnownOutcome, Like, LiveUser
from service.metrics.store import DamagedKind, FallbackReason

# KEYS: meta, deletions, prefixes of likes, items, users, tables of counts, outcomes, bundles. ARGV: the bundle's id,
# d_collab, the end of the bundle's own counts, what all keys begin with, digits of a bundle's id in a key, the number
# of users; for each user the id and 1 if the stored history is wanted; then the items whose counts are wanted. The
# offsets are the codec's.
#
# A key that holds another type, or a record that cannot be read, is left out and named in `damaged`: it costs itself
# alone. Where Redis does not hold the bundle, no record of it is used: likes, outcomes and deletions are of no bundle,
# and a table of counts is as good that begins at the same moment.
_LOOK_UP = """
local damaged = {}
local function ask(kind, ...)
  local reply = redis.pcall(...)
  if type(reply) ~= 'table' or not reply.err then return reply end
  if not string.find(reply.err, 'WRONGTYPE', 1, true) then return redis.call(...) end
  damaged[#damaged + 1] = kind
  return false
end

local meta = ask('meta', 'HMGET', KEYS[1], 'bundle_id', 'complete', 'counts') or {}
local held = meta[1] == ARGV[1] and meta[2] == '1'
local counts_table = held and meta[3] and KEYS[6] .. meta[3]
if not held then
  for _, other in ipairs(ask('meta', 'SMEMBERS', KEYS[8]) or {}) do
    local prefix = ARGV[4] .. ':' .. string.sub(other, 1, tonumber(ARGV[5])) .. ':'
    local told = ask('meta', 'HMGET', prefix .. 'meta', 'counts', 'counted_until', 'expired')
    if told and told[1] and not told[3] and tonumber(told[2]) == tonumber(ARGV[3]) then
      counts_table = prefix .. 'n:' .. told[1]
    end
  end
end
local d_collab = tonumber(ARGV[2])
local users, items, counted, seen = {}, {}, {}, {}
local behind = 6 + 2 * tonumber(ARGV[6])

local function counts(of, id)
  if not counts_table then return {} end
  return ask('counts', 'HMGET', counts_table .. of .. id, 'impressions', 'positives') or {}
end

local function width(flags)
  if flags < 2 then return 4 * d_collab end
  return 2 * d_collab
end

local function want(id)
  if seen[id] or not held then return end
  seen[id] = true
  local key = KEYS[4] .. id
  local head = ask('item', 'GETRANGE', key, 0, 15)
  if not head or #head == 0 then return end
  local known, flags, _, title = pcall(struct.unpack, '<BI2I4', head, 2)
  if not known then
    damaged[#damaged + 1] = 'item'
    return
  end
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

for place = 7, behind, 2 do
  local id, wanted = ARGV[place], ARGV[place + 1] == '1'
  local deleted = ask('deletion', 'HGET', KEYS[2], id)
  if deleted and not tonumber(deleted) then
    deleted, damaged[#damaged + 1] = false, 'deletion'
  end
  local record = held and ask('user', 'GET', KEYS[5] .. id)
  -- A record ends in the time of the user's first row. What is from before the deletion is not used.
  if deleted and record and (#record < 8 or struct.unpack('<d', record, #record - 7) <= tonumber(deleted)) then
    record = false
  end
  local likes = {}
  if wanted then
    if record then pcall(history, record) end
    likes = ask('likes', 'ZRANGE', KEYS[3] .. id, 0, -1, 'WITHSCORES') or {}
    for one = 1, #likes, 2 do want(string.match(likes[one], '([^%z]*)$')) end
  end
  local outcomes = ask('outcomes', 'ZRANGE', KEYS[7] .. id, 0, -1, 'WITHSCORES') or {}
  users[#users + 1] = {record, deleted, likes, counts(':u:', id), outcomes}
end
for place = behind + 1, #ARGV do counted[#counted + 1] = counts(':i:', ARGV[place]) end
return {held and 1 or 0, users, items, counted, counts_table and 1 or 0, damaged}
"""
_Record = TypeVar("_Record")

_SHA = sha1(_LOOK_UP.encode()).hexdigest()  # Redis's name of the script; no secret hangs on it


class LookUpError(Exception):
    """Redis did not answer a look-up so that it could be used; `reason` says why."""

    def __init__(self, reason: FallbackReason, message: str) -> None:
        super().__init__(message)
        self.reason: FallbackReason = reason


class NotPublishedError(Exception):
    """Redis answers, and does not hold the whole of a bundle."""


class RedisStore:
    """A `FeatureStore` of one bundle. Holds nothing but its cache: the client is the process's.

    A record that cannot be read is left out of an answer and named in `damaged`, and so is everything of a bundle that
    was not published completely (`held`): whoever asks has the bundle's own tables.
    """

    def __init__(
        self,
        client: Redis,
        bundle_id: str,
        codec: Codec,
        cache: ItemCache,
        keys: Keys = Keys(),  # noqa: B008 - frozen
        counted_until: float | None = None,
    ) -> None:
        """`counted_until` is the end of the bundle's own counts, UTC seconds."""
        self._client = client
        self.bundle_id = bundle_id
        self._live, self._keys = keys, keys.bundle(bundle_id)
        self._codec = codec
        self._cache = cache
        self._counted_until = counted_until
        self._held = True  # as of the last answer: no record is asked for where there is none

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
        damaged: list[DamagedKind] = []
        with _look_up_errors():
            counts_of = sorted(query.counts_of)
            told, records = await self._ask(user_ids, query.histories_of, counts_of, missing if self._held else [])
            held, told_users, told_items, told_counts, counts_known, told_damaged = told
            damaged += [one.decode() for one in told_damaged]
            self._held = held == 1
            if self._held and records is not None:
                asked = {
                    one: None if record is None else _read(self._codec.decode_item, one, record, "item", damaged)
                    for one, record in zip(missing, records, strict=True)
                }
                self._cache.put(bundle_id, asked)
                items.update((one, item) for one, item in asked.items() if item is not None)
            users, live = await self._users(user_ids, query.histories_of, told_users, damaged)
            counted = NOTHING_COUNTED  # no table of counts begins at the end of this bundle's own
            if counts_known == 1:
                users_told = [counts for *_, counts, _ in told_users]
                counted = Counted(
                    True, counts_told(user_ids, users_told, damaged), counts_told(counts_of, told_counts, damaged)
                )
            history_items = self._history_items(told_items, damaged)
        return Features(users, items, live, history_items, counted, held=self._held, damaged=tuple(damaged))

    async def _ask(
        self, user_ids: Sequence[str], histories_of: frozenset[str], counts_of: Sequence[str], item_ids: Sequence[str]
    ) -> tuple[list[Any], list[bytes | None] | None]:
        """Send script and MGET at once; a Redis that has lost the script gets it and is asked again."""
        try:
            return await self._send(user_ids, histories_of, counts_of, item_ids)
        except NoScriptError:
            await self._client.script_load(_LOOK_UP)
            return await self._send(user_ids, histories_of, counts_of, item_ids)

    async def _send(
        self, user_ids: Sequence[str], histories_of: frozenset[str], counts_of: Sequence[str], item_ids: Sequence[str]
    ) -> tuple[list[Any], list[bytes | None] | None]:
        keys, live = self._keys, self._live
        asked = [part for one in user_ids for part in (one, int(one in histories_of))]
        until = "" if self._counted_until is None else repr(self._counted_until)
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.evalsha(
                _SHA,
                8,
                *(keys.meta, live.deleted, live.likes, keys.items, keys.users, keys.counts, live.outcomes),
                live.bundles,
                *(self.bundle_id, self._codec.d_collab, until, live.root, BUNDLE_DIGITS),
                *(len(user_ids), *asked, *counts_of),
            )
            if item_ids:
                prefix = keys.items.encode()
                pipe.mget([prefix + one.encode() for one in item_ids])
            told, *rest = await pipe.execute()
        return told, rest[0] if rest else None

    async def _users(
        self,
        user_ids: Sequence[str],
        histories_of: frozenset[str],
        told: Sequence[Any],
        damaged: "list[DamagedKind]",
    ) -> tuple[dict[str, UserFeatures], dict[str, LiveUser]]:
        users: dict[str, UserFeatures] = {}
        live: dict[str, LiveUser] = {}
        for number, (user_id, (record, deleted, likes, _, outcomes)) in enumerate(zip(user_ids, told, strict=True), 1):
            if record is not None:
                user = _read(self._codec.decode_user, user_id, record, "user", damaged)
                if user is not None:
                    users[user_id] = user
            deleted_at = None if deleted is None else _time(deleted, damaged)
            if deleted_at is not None or outcomes or user_id in histories_of:
                live[user_id] = LiveUser(_likes(likes, damaged), deleted_at, _outcomes(outcomes, damaged))
            if number % USERS_AT_ONCE == 0:
                await asyncio.sleep(0)
        return users, live

    def _history_items(self, told: Sequence[bytes], damaged: "list[DamagedKind]") -> Mapping[str, HistoryItem]:
        found: dict[str, HistoryItem] = {}
        for item_id, part in zip(told[::2], told[1::2], strict=True):
            one = item_id.decode(errors="replace")
            item = _read(self._codec.decode_history_part, one, part, "item", damaged)
            if item is not None:
                found[one] = item
        return found

    async def check(self) -> str:
        """Return what Redis holds of the bundle, in words.

        Raises:
            LookUpError: it does not answer.
            NotPublishedError: it does not hold the whole bundle.
        """
        with _look_up_errors():
            names = ("bundle_id", "complete", "users", "items", "precision")
            found, complete, *told = await self._client.hmget(self._keys.meta, names)
            users, items, precision = map(_text, told)
            self._held = found == self.bundle_id.encode() and complete == b"1"
        if not self._held:
            raise NotPublishedError(f"Redis does not hold the whole of bundle {self.bundle_id[:12]}")
        return f"redis: {users} users, {items} items in {precision}"

    async def health(self) -> StoreHealth:
        """Return whether Redis answers and holds the bundle."""
        try:
            return StoreHealth(True, await self.check())
        except (LookUpError, NotPublishedError) as error:
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


def _read(
    decode: Callable[[str, bytes], _Record], one: str, record: bytes, kind: DamagedKind, damaged: "list[DamagedKind]"
) -> _Record | None:
    """Return what a record says; None for one that cannot be read, whose kind is then added to `damaged`."""
    try:
        return decode(one, record)
    except (RecordError, ValueError):
        damaged.append(kind)
        return None


def _text(value: bytes | str | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _time(told: bytes, damaged: "list[DamagedKind]") -> float | None:
    try:
        return float(told)
    except ValueError:
        damaged.append("deletion")
        return None


def counts_told(
    ids: Sequence[str], told: Sequence[Sequence[bytes | None]], damaged: "list[DamagedKind] | None" = None
) -> dict[str, Counts]:
    """Return counts by id from the numbers that Redis returned, without ids that were never counted."""
    counts = {}
    for one, numbers in zip(ids, told, strict=True):
        shown, liked = numbers or (None, None)
        try:
            impressions, positives = int(shown or 0), max(0, int(liked or 0))
        except ValueError:
            if damaged is not None:
                damaged.append("counts")
            continue
        if shown is not None or positives:
            # After a deletion a user's positives can exceed the impressions: the deletion removes earlier impressions.
            counts[one] = Counts(max(positives, impressions), positives)
    return counts


def _likes(told: Sequence[bytes], damaged: "list[DamagedKind]") -> tuple[Like, ...]:
    likes = []
    for member, time_ in zip(told[::2], told[1::2], strict=True):
        try:
            event_id, _, item_id = member.decode().rpartition("\0")
        except UnicodeError:
            damaged.append("likes")
            continue
        likes.append(Like(float(time_), event_id, item_id))
    return tuple(sorted(likes))


def _outcomes(told: Sequence[bytes], damaged: "list[DamagedKind]") -> tuple[KnownOutcome, ...]:
    outcomes = []
    for member, shown in zip(told[::2], told[1::2], strict=True):
        try:
            text = member.decode()
        except UnicodeError:
            damaged.append("outcomes")
            continue
        name, positive, item_id = text[:NAME_DIGITS], text.startswith("y", NAME_DIGITS), text[NAME_DIGITS + 1 :]
        outcomes.append(KnownOutcome(float(shown), name, item_id, positive))
    return tuple(outcomes)
