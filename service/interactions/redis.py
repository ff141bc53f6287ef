"""Interactions that several servers share, in Redis: likes, outcomes, counts and deletions.

The rules are those of each server's own log: an impression has one like, its earliest positive event. Likes, outcomes
and deletions say what shall be, so what comes twice, late or from another server changes nothing of them. Counts are
sums, so that each entry of a log must be applied once: its epoch's place moves with it, in one step.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from models.features import MAX_OUTCOMES
from service.features.keys import BUNDLE_DIGITS, Keys
from service.features.redis import counts_told
from service.interactions.counts import NEGATIVE, PENDING, POSITIVE, Counted
from service.interactions.event import LogEntry
from service.interactions.live import MAX_LIKES, NAME_DIGITS
from service.interactions.scripts import APPLY, FILL, FORGET, INDEX, LOST, UNFILLED
from service.interactions.shared import CountTable, Deletions, Impression, KnownBefore, SharedStoreError

_STATES = {PENDING: "p", NEGATIVE: "n", POSITIVE: "y"}
_CHUNK = 1000  # tombstones of one step


class RedisInteractions:
    """`SharedInteractions` in Redis. The client is the process's.

    Likes, outcomes and counts are kept `retention_s` after the last change, as long as the log keeps entries. The state
    of an impression is kept `impression_s` after its last change: until its outcome was due, and while other servers
    may tell of it. Deletions are kept for good.
    """

    def __init__(
        self,
        client: Redis,
        retention_s: float,
        impression_s: float | None = None,
        keys: Keys = Keys(),  # noqa: B008 - frozen
    ) -> None:
        self._client = client
        self._retention_s = max(1, round(retention_s))
        self._impression_s = self._retention_s if impression_s is None else max(1, round(impression_s))
        self._keys = keys
        self._scan = 0  # where indexing the deletions of earlier versions stands
        scripts = (APPLY, FILL, UNFILLED, FORGET, INDEX, LOST)
        self._apply, self._fill, self._unfilled, self._forget, self._index, self._lost = map(
            client.register_script, scripts
        )

    async def applied(self, epochs: Sequence[str]) -> list[int]:
        """Return for each epoch the `seq` of the last entry that was applied; 0 for none.

        Raises:
            SharedStoreError: Redis does not answer.
        """
        try:
            told = await self._mended(lambda: self._client.hmget(self._keys.applied, list(epochs)))
            return [int(one or 0) for one in told]
        except ValueError:  # damaged: how far the log was applied is lost
            await self.begin_again()
            return [0] * len(epochs)
        except (RedisError, OSError) as error:
            raise SharedStoreError(f"Redis does not tell what it has of the log: {error}") from error

    async def apply(
        self,
        epoch: str,
        entries: Sequence[LogEntry],
        after: int | None = None,
        *,
        log_id: str = "",
        known: Mapping[int, KnownBefore] | None = None,
        anew: bool = False,
    ) -> None:
        """Apply entries in one script, which runs whole or not at all.

        Raises:
            SharedStoreError: Redis does not answer, or refuses, or `after` is given and not what was applied last.
        """
        if not entries:
            return
        told = (epoch, entries[-1].seq, "" if after is None else after, int(anew))
        arguments = [part for entry in entries for part in _fields(entry, (known or {}).get(entry.seq))]
        try:
            await self._apply(self._shared_keys, [*self._common(log_id or epoch), *told, *arguments])
        except (RedisError, OSError) as error:
            raise SharedStoreError(f"Redis does not take interactions: {error}") from error

    async def deletions(self, mark: float, limit: int = _CHUNK) -> Deletions:
        """Return deletions that Redis has heard of behind a mark, with the time of each, UTC seconds.

        Raises:
            SharedStoreError: Redis does not answer.
        """
        try:
            await self._mended(self._index_deletions)
            found = await _value(
                self._client.zrangebyscore(
                    self._keys.deletions, f"({mark!r}", "+inf", start=0, num=limit, withscores=True
                )
            )
            times = await _value(self._client.hmget(self._keys.deleted, [user for user, _ in found])) if found else []
        except (RedisError, OSError) as error:
            raise SharedStoreError(f"Redis does not tell who was deleted: {error}") from error
        users = [
            (user.decode(), when)
            for (user, _), told in zip(found, times, strict=True)
            if (when := _time(told)) is not None
        ]
        return Deletions(users, float(found[-1][1]) if found else mark, len(found) == limit)

    async def _index_deletions(self) -> None:
        """Number the deletions that are not numbered: an earlier version, which may still run beside, has none."""
        keys = self._keys
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.hlen(keys.deleted)
            pipe.zcard(keys.deletions)
            told, numbered = await pipe.execute()
        while told > numbered:
            self._scan, some = await _value(self._client.hscan(keys.deleted, self._scan, count=_CHUNK))
            if some:
                await self._index([keys.deletions], list(some))
            if self._scan == 0:
                return

    async def unfilled(self, log_id: str, epochs: Sequence[str] = ()) -> tuple[CountTable, ...]:
        """Return the tables of counts that lack the entries of a log that were applied before the tables began.

        Raises:
            SharedStoreError: Redis does not answer.
        """
        try:
            told = await self._unfilled(self._shared_keys, [*self._common(log_id), *epochs])
            return tuple(
                CountTable(
                    number.decode(),
                    float(since),
                    tuple(int(one or 0) for one in begun) or None,
                    after.decode(),
                )
                for number, since, after, begun in told
            )
        except (RedisError, OSError, ValueError) as error:
            raise SharedStoreError(f"Redis does not tell which counts it lacks: {error}") from error

    async def fill(self, log_id: str, table: CountTable, impressions: Sequence[Impression], *, last: bool) -> None:
        """Count impressions in a table that has not counted them; `last` marks the last part of the log.

        Raises:
            SharedStoreError: Redis does not answer, or refuses, or was told of these impressions before.
        """
        arguments = [
            part
            for one in impressions
            for part in (one.user_id, one.item_id, one.impression_id, "y" if one.positive else "n", _number(one.shown))
        ]
        told = (table.number, table.after, int(last))
        try:
            await self._fill(self._shared_keys, [*self._common(log_id), *told, *arguments])
        except (RedisError, OSError) as error:
            raise SharedStoreError(f"Redis does not take counts: {error}") from error

    async def lost(self, users: Sequence[str], deletions: Sequence[tuple[str, float]]) -> tuple[str, ...]:
        """Return in words what Redis has lost; tombstones that it lacks are put back.

        Raises:
            SharedStoreError: Redis does not answer.
        """
        try:
            if deletions:
                known = await _value(self._client.hmget(self._keys.deleted, [user for user, _ in deletions]))
                gone = [
                    part
                    for (user, when), told in zip(deletions, known, strict=True)
                    if (_time(told) or float("-inf")) < when
                    for part in (user, _number(when))
                ]
                if gone:
                    await self._forget(self._shared_keys, [*self._common(""), *gone])
            stats = await self._client.info("stats")
            server = await self._client.info("server")
            told = await self._lost(
                [self._keys.evicted, self._keys.deleted],
                [server["run_id"], int(stats["evicted_keys"]), self._keys.likes, *users],
            )
        except (RedisError, OSError, KeyError) as error:
            raise SharedStoreError(f"Redis does not tell what it has lost: {error}") from error
        evicted, likes = int(told[0]), int(told[1])
        found = [f"{evicted} keys were evicted"] if evicted else []
        return (*found, *([f"the likes of {likes} of {len(users)} users are gone"] if likes else []))

    async def begin_again(self) -> None:
        """Forget how far each log was applied: the first entry that is applied then begins new tables of counts.

        Raises:
            SharedStoreError: Redis does not answer.
        """
        try:
            await _value(self._client.delete(self._keys.applied))
        except (RedisError, OSError) as error:
            raise SharedStoreError(f"Redis does not forget what it has of the logs: {error}") from error

    async def counts(self, bundle_id: str, user_ids: Iterable[str], item_ids: Iterable[str]) -> Counted:
        """Return the servers' shared live counts of users and items, since the end of a published bundle's own counts.

        Raises:
            SharedStoreError: Redis does not answer.
        """
        users, items, keys = list(user_ids), list(item_ids), self._keys.bundle(bundle_id)
        try:
            table = keys.counts + (await _value(self._client.hget(keys.meta, "counts")) or b"").decode()
            async with self._client.pipeline(transaction=False) as pipe:
                for key in (*(f"{table}:u:{one}" for one in users), *(f"{table}:i:{one}" for one in items)):
                    pipe.hmget(key, ["impressions", "positives"])
                told = await pipe.execute()
        except (RedisError, OSError) as error:
            raise SharedStoreError(f"Redis does not tell counts: {error}") from error
        return Counted(True, counts_told(users, told[: len(users)]), counts_told(items, told[len(users) :]))

    async def _mended(self, ask: Callable[[], Any]) -> Any:
        """Return a reply; a key of another type is damaged: it is removed, and comes again from the logs."""
        try:
            return await ask()
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
        keys = self._keys
        for key, wanted in ((keys.applied, b"hash"), (keys.deleted, b"hash"), (keys.deletions, b"zset")):
            if await self._client.type(key) != wanted:
                await _value(self._client.delete(key))
        return await ask()

    @property
    def _shared_keys(self) -> tuple[str, ...]:
        return self._keys.applied, self._keys.deleted, self._keys.bundles, self._keys.deletions, self._keys.tables

    def _common(self, log_id: str) -> tuple[str | int, ...]:
        keys, kept = self._keys, (self._retention_s, self._impression_s, MAX_LIKES, MAX_OUTCOMES)
        return log_id, *kept, BUNDLE_DIGITS, NAME_DIGITS, keys.root, keys.impression, keys.likes, keys.outcomes


def _fields(entry: LogEntry, known: KnownBefore | None) -> tuple[str, ...]:
    one = entry.interaction
    label = "" if one.label is None else str(int(one.label))
    before, shown, like = "", "", ""
    if known is not None:
        before, shown = _STATES[known.state], _number(known.shown)
        like = "" if known.like is None else f"{_number(known.like[0])} {known.like[1]}"
    told = (entry.kind, one.event_id, one.user_id, one.item_id, label, _number(one.timestamp), one.impression_id)
    return *told, before, shown, like


def _number(value: float) -> str:
    return repr(float(value))


def _time(told: bytes | None) -> float | None:
    try:
        return None if told is None else float(told)
    except ValueError:  # damaged: it costs itself alone, and the log that has it puts it back
        return None


async def _value(reply: Any) -> Any:
    """Wait for a reply: redis-py's annotations leave open whether a command's is awaited."""
    return await reply
