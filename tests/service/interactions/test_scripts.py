"""The rules of the log and those of the scripts in a real Redis: whatever happens, both end the same."""

import asyncio
import random
import sqlite3
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis import Redis as SyncRedis
from redis.asyncio import Redis

from models.fusion import Counts
from service.features.cache import ItemCache
from service.features.client import open_client
from service.features.codec import Codec
from service.features.keys import Keys
from service.features.protocol import Query
from service.features.publish import _COUNT
from service.features.redis import RedisStore
from service.interactions import replayed
from service.interactions.epochs import Position
from service.interactions.event import Interaction
from service.interactions.ledger import Ledger
from service.interactions.live import LiveUser
from service.interactions.redis import RedisInteractions
from service.metrics.registry import Metrics
from tests.redis_server import RedisServer
from tests.service.interactions.conftest import NOW
from tests.service.interactions.test_ledger import ledger

USERS, ITEMS, KEYS = ("u1", "u2"), ("i1", "i2"), Keys()
EARLY, LATE = "a" * 64, "b" * 64  # bundles: their own counts end before all events, and between them
SINCE = {EARLY: NOW - 1, LATE: NOW + 1}

Check = Callable[["Fleet"], Awaitable[None]]


@dataclass(frozen=True)
class Step:
    """Something that happens: events of one batch, an expiry, a deletion, or something at Redis."""

    kind: str  # take, expire, delete, apply, forget, publish
    log: int = 0
    events: tuple[Interaction, ...] = ()
    user: str = ""
    batch: int = 1


def steps(logs: int, kinds: Sequence[str]) -> st.SearchStrategy[list[Step]]:
    """Steps of some servers; no event id comes twice."""

    @st.composite
    def one(draw: st.DrawFn) -> Step:
        kind = draw(st.sampled_from(kinds))
        events = draw(st.lists(events_of(), min_size=1, max_size=4)) if kind == "take" else []
        return Step(
            kind,
            draw(st.integers(0, logs - 1)),
            tuple(events),
            draw(st.sampled_from(USERS)),
            draw(st.integers(1, 3)),
        )

    def named(found: list[Step]) -> list[Step]:
        return [
            replace(step, events=tuple(replace(one, event_id=f"e{place}-{n}") for n, one in enumerate(step.events)))
            for place, step in enumerate(found)
        ]

    return st.lists(one(), min_size=2, max_size=14).map(named)


def events_of() -> st.SearchStrategy[Interaction]:
    return st.builds(
        Interaction,
        event_id=st.just(""),
        user_id=st.sampled_from(USERS),
        item_id=st.sampled_from(ITEMS),
        label=st.sampled_from([None, False, True]),
        timestamp=st.integers(0, 3).map(lambda one: NOW + one),
        request_id=st.sampled_from([None, "r", "q"]),
        position=st.just(1),
    )


class Fleet:
    """Logs and the Redis that they share."""

    def __init__(self, logs: Sequence[Ledger], client: Redis, plain: SyncRedis) -> None:
        self.logs, self.client, self.plain = logs, client, plain
        self.shared = RedisInteractions(client, 86_400, 3600)
        self.remembers = True
        self.deleted = False

    async def run(self, step: Step) -> None:
        log = self.logs[step.log]
        if step.kind == "take":
            log.take(step.events, NOW)
        elif step.kind == "expire":
            log.expire(NOW + 60, 2)
        elif step.kind == "delete":
            self.deleted = True
            log.delete(step.user, log.newest_timestamp(step.user) or NOW, NOW)
        elif step.kind == "apply":
            await self.apply(log, step.batch)
        elif step.kind == "forget":
            self.end_impressions()
        elif step.kind == "publish":
            self.publish(LATE)

    async def apply(self, log: Ledger, batch: int) -> bool:
        """Apply the next entries as `Replay` does; return whether there were any."""
        position = log.position()
        told = await self.shared.applied([one.id for one in position.epochs])
        for place in position.places(told):
            entries = [one for one in log.read(place.seq, batch) if one.seq <= place.end]
            if entries:
                known = {} if self.remembers else replayed.known_before(log.connection, entries)
                epoch = position.epochs[place.number].id
                more = {"log_id": log.log_id, "known": known, "anew": not any(told)}
                await self.shared.apply(epoch, entries, told[place.number], **more)  # type: ignore[arg-type]
                return True
        return False

    async def finish(self) -> None:
        """Apply and fill in everything."""
        for log in self.logs:
            while await self.apply(log, 2):
                pass
        for log in self.logs:
            position = log.position()
            while tables := await self.shared.unfilled(log.log_id, [one.id for one in position.epochs]):
                await self.fill(log, position, tables[0])

    async def fill(self, log: Ledger, position: Position, table: object) -> None:
        begun = table.begun  # type: ignore[attr-defined]
        until = position.seq if begun is None else next((one.seq for one in position.places(begun)), position.seq)
        since, after = table.since, table.after  # type: ignore[attr-defined]
        found = replayed.known_impressions(log.connection, since, after, 2, until)
        await self.shared.fill(log.log_id, table, found, last=len(found) < 2)  # type: ignore[arg-type]

    def end_impressions(self) -> None:
        """Let the keys of impressions whose outcome is known end: their time is over."""
        self.remembers = False
        for key in self.plain.scan_iter(f"{KEYS.impression}*"):
            if (self.plain.get(key) or b"p")[:1] != b"p":
                self.plain.delete(key)

    def publish(self, bundle: str) -> None:
        """Begin a bundle's table of counts, as publishing it does."""
        keys = KEYS.bundle(bundle)
        shared = (keys.meta, KEYS.bundles, KEYS.tables, KEYS.applied)
        self.plain.eval(_COUNT, 4, *shared, bundle, repr(SINCE[bundle]), keys.counts)

    async def live(self) -> dict[str, LiveUser]:
        store = RedisStore(self.client, EARLY, Codec(2, 2), ItemCache(0, Metrics().store))
        return in_order((await store.look_up(EARLY, Query(frozenset(USERS), frozenset(), frozenset(USERS)))).live)

    async def counts(self, bundle: str) -> tuple[dict[str, Counts], dict[str, Counts]]:
        told = await self.shared.counts(bundle, USERS, ITEMS)
        return tuple({one: c for one, c in table.items() if any(c)} for table in (told.users, told.items))  # type: ignore[return-value]


def in_order(live: Mapping[str, LiveUser]) -> dict[str, LiveUser]:
    """Every user; outcomes of one time in the order of their names: the log has them by impression."""
    found = {user: live.get(user, LiveUser()) for user in USERS}
    return {user: replace(one, outcomes=tuple(sorted(one.outcomes))) for user, one in found.items()}


def run(server: RedisServer, logs: int, what: list[Step], check: Check) -> None:
    async def main(opened: Sequence[Ledger]) -> None:
        async with open_client(server.url, 10.0) as client:
            with server.client() as plain:
                plain.flushall()
                fleet = Fleet(opened, client, plain)
                fleet.publish(EARLY)
                for step in what:
                    await fleet.run(step)
                await fleet.finish()
                await check(fleet)

    with ledger() as one, ledger() as other:
        other.log_id = "another log"
        asyncio.run(main((one, other)[:logs]))


async def ends_as_its_log(fleet: Fleet) -> None:
    [log] = fleet.logs
    assert await fleet.live() == in_order(log.live(USERS))
    for bundle, since in SINCE.items():
        if bundle == LATE:
            fleet.publish(LATE)
            await fleet.finish()
        users, items = await fleet.counts(bundle)
        wanted_users, wanted_items = log.counted_since(since)
        assert users == wanted_users
        if not fleet.deleted:  # items keep what a deleted user did, until a table begins anew
            assert items == wanted_items


@given(steps(1, ["take", "take", "take", "expire", "delete", "apply", "forget", "publish"]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_redis_ends_as_the_log_that_it_follows_whenever_its_memory_of_impressions_ends(
    running_redis: RedisServer, what: list[Step]
) -> None:
    run(running_redis, 1, what, ends_as_its_log)


async def ends_as_one_log(fleet: Fleet) -> None:
    entries = [(entry, log) for log in fleet.logs for entry in log.read(0, 1000)]
    with ledger() as all_of_them:
        for entry, _ in entries:
            all_of_them._append(entry.kind, entry.interaction, NOW)
        assert await fleet.live() == in_order(all_of_them.live(USERS))
        for bundle, since in SINCE.items():
            if bundle == LATE:
                fleet.publish(LATE)
                await fleet.finish()
            assert await fleet.counts(bundle) == all_of_them.counted_since(since)


@given(steps(2, ["take", "take", "expire", "apply", "publish"]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_two_servers_end_as_one_that_was_told_everything(running_redis: RedisServer, what: list[Step]) -> None:
    run(running_redis, 2, what, ends_as_one_log)


@pytest.mark.parametrize("seed", range(8))
def test_a_log_that_is_put_back_as_it_was_at_any_moment_goes_on_and_counts_nothing_twice(
    running_redis: RedisServer, seed: int
) -> None:
    """What was lost with the newer log stays in Redis: it was acknowledged. What comes later is added to it."""
    rng = random.Random(seed)

    def event(number: int) -> Interaction:
        user, item = rng.choice(USERS), rng.choice(ITEMS)
        return Interaction(f"e{number}", user, item, rng.random() < 0.5, NOW + number)

    async def main(log: Ledger, backup: sqlite3.Connection) -> None:
        async with open_client(running_redis.url, 10.0) as client:
            with running_redis.client() as plain:
                plain.flushall()
                await restored(Fleet([log], client, plain), log, backup)

    async def restored(fleet: Fleet, log: Ledger, backup: sqlite3.Connection) -> None:
        fleet.publish(EARLY)
        told = [event(number) for number in range(rng.randrange(0, 20))]
        log.take(told, NOW)
        log.connection.backup(backup)
        lost = [event(number) for number in range(100, 100 + rng.randrange(1, 20))]
        log.take(lost, NOW)
        await fleet.finish()
        fleet.end_impressions()
        put_back = Ledger(backup, 60.0)
        fleet.logs = [put_back]
        later = [event(number) for number in range(200, 200 + rng.randrange(5, 40))]
        for number, one in enumerate(later):
            if number % 10 == 0:  # a restart
                put_back.begin_epoch()
                await fleet.apply(put_back, rng.choice([1, 1000]))
            put_back.take([one], NOW)
        await fleet.finish()
        told += lost + later
        users, items = await fleet.counts(EARLY)
        assert sum(one.impressions for one in users.values()) == len(told)
        assert sum(one.positives for one in items.values()) == sum(one.label is True for one in told)
        likes = {like.event_id for one in (await fleet.live()).values() for like in one.likes}
        assert likes == {one.event_id for one in told if one.label}

    with ledger() as log, ledger() as other:
        asyncio.run(main(log, other.connection))
