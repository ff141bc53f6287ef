"""A bundle's users and items to Redis: everything written and counted first, the pointer to it switched last.

Progress is kept in the bundle's meta, so that a publish that was killed goes on where it was. Writing twice is
harmless: a record is a function of the bundle and the precision alone. So a bundle that is there already is compared
with what it should be, and what is damaged or lost is written anew.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import redis
from redis.exceptions import RedisError

from models.features import Tables
from models.loading import Bundle
from service.features.codec import RECORD_VERSION, Codec, Precision, PrecisionName
from service.features.keys import BUNDLE_DIGITS, Keys
from service.features.supersede import expire_superseded

_KEY_BYTES = 120  # what Redis itself takes for a key of this length and its entry
_SAMPLE = 64  # records that memory is estimated by
_EXISTS = 1000  # keys asked for at once

# KEYS: pointer, meta. ARGV: the bundle's id, now, seconds to keep what is superseded, digits of a bundle's id in a key,
# what all keys begin with.
_SWITCH = """
local old = redis.call('GET', KEYS[1])
redis.call('HDEL', KEYS[2], 'expires_at', 'ends', 'expired')
redis.call('SET', KEYS[1], ARGV[1])
if old and old ~= ARGV[1] then
  local meta = ARGV[5] .. ':' .. string.sub(old, 1, tonumber(ARGV[4])) .. ':meta'
  if redis.call('EXISTS', meta) == 1 then redis.call('HSET', meta, 'expires_at', ARGV[2] + ARGV[3]) end
end
"""

# Begins a table of counts, unless the bundle has a table that does not expire. KEYS: meta, bundles, number of tables,
# applied. ARGV: the bundle's id, the time at which its own counts end, prefix of tables. It is one step: entries that
# are applied after it are counted at once. Each server fills in the entries applied before it from its log; `begun`
# says which.
_COUNT = """
if not redis.call('HGET', KEYS[1], 'counts') or redis.call('HEXISTS', KEYS[1], 'expires_at') == 1 then
  local number = redis.call('INCR', KEYS[3])
  redis.call('HSET', KEYS[1], 'counts', number, 'counted_until', ARGV[2])
  local applied = redis.call('HGETALL', KEYS[4])
  for place = 1, #applied, 2 do
    redis.call('HSET', ARGV[3] .. number .. ':begun', applied[place], applied[place + 1])
  end
end
redis.call('HDEL', KEYS[1], 'expires_at', 'ends', 'expired')
redis.call('SADD', KEYS[2], ARGV[1])
"""

_MARKERS = ("items_done", "users_done", "finished")

Tick = Callable[[str, int, int], None]  # what is being done, how many of how many


class PublishError(Exception):
    """Redis cannot take the bundle; the pointer was not switched."""


@dataclass(frozen=True, slots=True)
class PublishOptions:
    """How a bundle is published."""

    precision: PrecisionName = "float32"
    batch: int = 500  # records of one round trip: some megabytes at Qwen2-7B's sizes
    keep_s: int = 3600  # how long a superseded bundle stays: servers that have not switched yet look up in it
    again: bool = False  # write a bundle anew that is there already
    stage: bool = False  # leave the pointer where it is


@dataclass(frozen=True, slots=True)
class Published:
    """What came of it."""

    already: bool  # it was there before; nothing was written but what was damaged or lost
    users: int
    items: int
    deleted: int  # users who were deleted after the first row that the bundle learned of them, and left out
    expiring: int  # keys of superseded bundles that were given their end
    current: bool  # Redis points to it
    repaired: int = 0  # records that were damaged or lost


class Publisher:
    """Writes one verified bundle. The client may wait, and is closed by whoever opened it."""

    def __init__(
        self,
        client: "redis.Redis",
        bundle: Bundle,
        options: PublishOptions,
        tick: Tick,
        keys: Keys = Keys(),  # noqa: B008 - frozen
    ) -> None:
        self._client = client
        self._bundle = bundle
        self._options = options
        self._tick = tick
        self._shared, self._keys = keys, keys.bundle(bundle.id)
        self._precision = Precision.named(options.precision)
        sizes = bundle.manifest.dimensions
        self._codec = Codec(sizes.d_collab, sizes.d_model)

    def publish(self) -> Published:
        """Write, count, switch, and let what is superseded expire.

        Raises:
            PublishError: Redis refuses, has no room, or has lost what was written.
            RecordError: the bundle's numbers do not fit the precision.
        """
        try:
            return self._publish()
        except RedisError as error:
            raise PublishError(reason(error)) from error

    def withdraw(self) -> int:
        """Let a bundle that was staged expire; return how many keys were given their end.

        Raises:
            PublishError: Redis refuses, does not have it, or points to it.
        """
        try:
            if self._client.get(self._shared.pointer) == self._bundle.id.encode():
                raise PublishError(f"bundle {self._bundle.id[:12]} is the current one; publish another one instead")
            if not self._client.exists(self._keys.meta):
                raise PublishError(f"bundle {self._bundle.id[:12]} is not there")
            self._client.hsetnx(self._keys.meta, "expires_at", str(time.time() + self._options.keep_s))
            return self._expire()
        except RedisError as error:
            raise PublishError(reason(error)) from error

    def _publish(self) -> Published:
        self._clear_other_types()
        meta = {_text(key): _text(value) for key, value in self._client.hgetall(self._keys.meta).items()}
        current = self._client.get(self._shared.pointer) == self._bundle.id.encode()
        whole = self._is_whole(meta, current=current) and not self._options.again
        already = whole and (current or self._options.stage)
        tables = self._bundle.tables()
        repaired = 0
        if whole:
            self._precision = Precision.named(cast("PrecisionName", meta["precision"]))
            self._count()
            repaired = self._repair(tables)
        else:
            self._begin(tables, meta)
            self._write_items(tables)
            self._write_users(tables)
        deleted = self._remove_deleted(tables)
        if not whole:
            self._verify(tables)
        self._client.hset(self._keys.meta, "complete", "1")
        if not self._options.stage and not current:
            self._switch()
        current = current or not self._options.stage
        kept = len(tables.user_ids) - deleted
        return Published(
            already and not repaired, kept, len(tables.item_ids), deleted, self._expire(), current, repaired
        )

    def _clear_other_types(self) -> None:
        """Remove what has the type of another key: no command would work on it, and nothing of it can be kept."""
        shared = self._shared
        types = {self._keys.meta: "hash", shared.pointer: "string", shared.bundles: "set", shared.tables: "string"}
        for key, wanted in {**types, shared.deleted: "hash", shared.serving: "zset"}.items():
            if _text(self._client.type(key)) not in (wanted, "none"):
                self._client.unlink(key)

    def _is_whole(self, meta: dict[str, str], *, current: bool) -> bool:
        """Return whether the bundle was published completely before, in a form that this release reads."""
        told = self._told(self._bundle.tables())
        same = {name: value for name, value in told.items() if name != "precision" or not current}
        whole = meta.get("complete") == "1" and meta.get("precision") in get_args(PrecisionName)
        return whole and "expires_at" not in meta and all(meta.get(name) == value for name, value in same.items())

    def _expire(self) -> int:
        return expire_superseded(self._client, self._shared, lambda done: self._tick("expiring", done, done))

    def _repair(self, tables: Tables) -> int:
        """Write anew what is damaged or lost of a bundle that is there; return how many records."""
        repaired = 0
        for prefix, ids, record in (
            (self._keys.items, tables.item_ids, self._item_record),
            (self._keys.users, tables.user_ids, self._user_record),
        ):
            for first, some in _chunks(ids, self._options.batch):
                gone = self._deleted(tables, some) if prefix == self._keys.users else set()
                there = self._client.mget([prefix + one for one in some])
                with self._client.pipeline(transaction=False) as pipe:
                    for row, (one, found) in enumerate(zip(some, there, strict=True), first):
                        if one not in gone and found != (wanted := record(tables, row)):
                            pipe.set(prefix + one, wanted)
                            repaired += 1
                    pipe.execute()
                self._tick("checking", first + len(some), len(ids))
        return repaired

    def _told(self, tables: Tables) -> dict[str, str]:
        """Return what the bundle's meta says of its records."""
        return {
            "bundle_id": self._bundle.id,
            "version": str(RECORD_VERSION),
            "precision": self._options.precision,
            "d_collab": str(self._codec.d_collab),
            "d_model": str(self._codec.d_model),
            "users": str(len(tables.user_ids)),
            "items": str(len(tables.item_ids)),
        }

    def _begin(self, tables: Tables, meta: dict[str, str]) -> None:
        """Check the room, and start anew unless the same was begun before."""
        told: dict[Any, Any] = dict(self._told(tables))
        other = meta.get("bundle_id", self._bundle.id)
        if other != self._bundle.id and other[:BUNDLE_DIGITS] == self._bundle.id[:BUNDLE_DIGITS]:
            raise PublishError(f"{self._keys.meta} belongs to bundle {other}, whose id begins alike; remove that first")
        resumes = all(meta.get(key) == value for key, value in told.items()) and "expires_at" not in meta
        if not resumes or (self._options.again and meta.get("finished") == "1"):
            self._check_room(tables, meta)
            self._client.hset(self._keys.meta, mapping={**told, **dict.fromkeys(_MARKERS, "0")})
        # Known before the first record is written: a deletion takes the user out of every known bundle.
        self._count()
        self._client.persist(self._keys.meta)

    def _count(self) -> None:
        counted_until, shared = repr(self._bundle.manifest.counted_until), self._shared
        keys = (self._keys.meta, shared.bundles, shared.tables, shared.applied)
        self._client.eval(_COUNT, len(keys), *keys, self._bundle.id, counted_until, self._keys.counts)

    def _check_room(self, tables: Tables, meta: dict[str, str]) -> None:
        """Refuse before anything is written what cannot fit. A bundle that is rewritten has its room."""
        if "finished" in meta:
            return
        info = self._client.info("memory")
        limit, used = int(info.get("maxmemory", 0)), int(info["used_memory"])
        needed = self._estimate(tables)
        if limit and used + needed > limit:
            raise PublishError(
                f"Redis has {max(0, limit - used) / 2**20:.1f} MiB left of its maxmemory and the bundle needs about"
                f" {needed / 2**20:.1f} MiB; raise maxmemory, or publish in float16 or bfloat16"
            )

    def _estimate(self, tables: Tables) -> int:
        """Return about how many bytes the bundle takes in Redis."""
        needed = 0
        for rows, one in ((len(tables.item_ids), self._item_record), (len(tables.user_ids), self._user_record)):
            sample = range(0, rows, max(1, rows // _SAMPLE))
            sizes = [_KEY_BYTES + len(one(tables, row)) for row in sample]
            needed += round(rows * sum(sizes) / max(1, len(sizes)))
        return needed

    def _item_record(self, tables: Tables, row: int) -> bytes:
        item = tables.item(tables.item_ids[row])
        assert item is not None, "the tables know their own items"
        return self._codec.encode_item(item, self._precision)

    def _user_record(self, tables: Tables, row: int) -> bytes:
        user = tables.user(tables.user_ids[row])
        assert user is not None, "the tables know their own users"
        return self._codec.encode_user(user, self._precision)

    def _write_items(self, tables: Tables) -> None:
        for first, ids in self._batches("items_done", tables.item_ids):
            with self._client.pipeline(transaction=False) as pipe:
                for row, item_id in enumerate(ids, first):
                    pipe.set(self._keys.items + item_id, self._item_record(tables, row))
                pipe.hset(self._keys.meta, "items_done", first + len(ids))
                pipe.execute()
            self._tick("items", first + len(ids), len(tables.item_ids))

    def _write_users(self, tables: Tables) -> None:
        for first, ids in self._batches("users_done", tables.user_ids):
            gone = self._deleted(tables, ids)
            with self._client.pipeline(transaction=False) as pipe:
                for row, user_id in enumerate(ids, first):
                    if user_id not in gone:
                        pipe.set(self._keys.users + user_id, self._user_record(tables, row))
                pipe.hset(self._keys.meta, "users_done", first + len(ids))
                pipe.execute()
            self._tick("users", first + len(ids), len(tables.user_ids))

    def _batches(self, marker: str, ids: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
        """Yield what has not been written yet, with the row it begins at."""
        done = int(self._client.hget(self._keys.meta, marker) or 0)
        for first in range(done, len(ids), self._options.batch):
            yield first, ids[first : first + self._options.batch]

    def _deleted(self, tables: Tables, user_ids: Sequence[str]) -> set[str]:
        """Return the users who were deleted and of whom the bundle has something from before that."""
        times = self._client.hmget(self._shared.deleted, list(user_ids)) if user_ids else []
        deleted = {one: float(time_) for one, time_ in zip(user_ids, times, strict=True) if time_ is not None}
        users = {one: tables.user(one) for one in deleted}
        return {one for one, user in users.items() if user is None or not user.may_be_used(deleted[one])}

    def _remove_deleted(self, tables: Tables) -> int:
        """Remove who was deleted while they were being written; whoever is deleted from now on is removed by that."""
        gone = [one for _, ids in _chunks(tables.user_ids, _EXISTS) for one in self._deleted(tables, ids)]
        for _, ids in _chunks(gone, _EXISTS):
            self._client.unlink(*(self._keys.users + one for one in ids))
        return len(gone)

    def _verify(self, tables: Tables) -> None:
        """Count what is there: a Redis that evicts, or that was emptied meanwhile, has lost some of it."""
        lost = self._lost(self._keys.items, tables.item_ids)
        lost += [one for one in self._lost(self._keys.users, tables.user_ids) if not self._deleted(tables, [one])]
        if lost:
            self._client.hset(self._keys.meta, mapping={"items_done": 0, "users_done": 0})
            raise PublishError(
                f"Redis has lost {len(lost)} of the records written, {lost[0]!r} among them; set maxmemory-policy to"
                " noeviction, give it the room, and publish again"
            )
        self._client.hset(self._keys.meta, "finished", 1)

    def _lost(self, prefix: str, ids: Sequence[str]) -> list[str]:
        lost = []
        for first, some in _chunks(ids, _EXISTS):
            if self._client.exists(*(prefix + one for one in some)) != len(some):
                with self._client.pipeline(transaction=False) as pipe:
                    for one in some:
                        pipe.exists(prefix + one)
                    lost += [one for one, there in zip(some, pipe.execute(), strict=True) if not there]
            self._tick("verifying", first + len(some), len(ids))
        return lost

    def _switch(self) -> None:
        shared, kept = self._shared, str(self._options.keep_s)
        told = (self._bundle.id, str(time.time()), kept, str(BUNDLE_DIGITS), shared.root)
        self._client.eval(_SWITCH, 2, shared.pointer, self._keys.meta, *told)


def _chunks(ids: Sequence[str], size: int) -> Iterator[tuple[int, Sequence[str]]]:
    for first in range(0, len(ids), size):
        yield first, ids[first : first + size]


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def reason(error: RedisError) -> str:
    """Return one line that says what to do about an error of Redis."""
    if isinstance(error, redis.ReadOnlyError):
        return "Redis is a read-only replica; publish to its primary"
    if isinstance(error, redis.exceptions.OutOfMemoryError):
        return "Redis has no memory left; raise maxmemory, or publish in float16 or bfloat16, then publish again"
    if isinstance(error, redis.AuthenticationError):
        return "Redis refuses user or password; check the address"
    if isinstance(error, redis.ConnectionError | redis.TimeoutError):
        return f"Redis cannot be reached: {error}; once it is back, publish again and it goes on from there"
    return f"Redis refuses: {error}"
