"""The replay into a real Redis: logs that were put back, impressions whose time is over, data that Redis has lost."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from models.fusion import Counts
from models.loading import Bundle
from service.features.keys import Keys
from service.interactions.event import Interaction
from service.interactions.log import EventLog, LogLimits
from service.interactions.redis import RedisInteractions
from service.interactions.replay import Replay
from service.metrics.interactions import InteractionMetrics
from tests.redis_server import RedisServer, redis_server
from tests.service.interactions.conftest import DAY_S, NOW, FakeTime, Open, event
from tests.service.published import publish

pytestmark = pytest.mark.anyio
KEYS = Keys()
ATTRIBUTION_S = 60.0


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_S", "DELETIONS_S", "AUDIT_S", "TABLES_S", "FIRST_RETRY_S", "LAST_RETRY_S"):
        monkeypatch.setattr(f"service.interactions.replay.{name}", 0.02)


@pytest.fixture
def shared(redis_client: Redis) -> RedisInteractions:
    return RedisInteractions(redis_client, 90 * DAY_S, ATTRIBUTION_S + 900)


@asynccontextmanager
async def replayed(
    log: EventLog, shared: RedisInteractions, registry: CollectorRegistry | None = None
) -> AsyncIterator[Replay]:
    replay = Replay(log, shared, InteractionMetrics(registry or CollectorRegistry()), structlog.get_logger())
    task = asyncio.create_task(replay.run())
    try:
        yield replay
    finally:
        while not task.done():  # before Python 3.12 a cancellation can be lost
            task.cancel()
            await asyncio.wait([task], timeout=0.5)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.01)


def likes(numbers: Sequence[int], name: str = "e") -> list[Interaction]:
    return [event(f"{name}{number}", item_id=f"i{number}", timestamp=NOW + number) for number in numbers]


def liked(redis: RedisServer, user: str = "u1") -> set[str]:
    with redis.client() as client:
        return {one.partition(b"\0")[0].decode() for one in client.zrange(KEYS.likes + user, 0, -1)}


@pytest.mark.parametrize("away", [True, False])
async def test_every_like_after_a_backup_was_put_back_reaches_redis_and_none_counts_twice(
    redis: RedisServer, shared: RedisInteractions, bundle: Bundle, new_log: Open, path: Path, away: bool
) -> None:
    """Also those whose numbers Redis has applied before; while Redis is away, and while it is there."""
    publish(redis, bundle)
    backup = path.with_name("backup.sqlite")
    log = new_log()
    await log.start()
    await log.append(likes(range(10)))
    await log.close()
    shutil.copy(path, backup)
    log = new_log()
    await log.start()
    await log.append(likes(range(10, 40), "lost"))
    async with replayed(log, shared) as replay:
        assert await replay.caught_up(log.position().seq, 20)
    await log.close()
    shutil.copy(backup, path)
    log = new_log()
    await log.start()
    registry = CollectorRegistry()
    if away:
        await log.append(likes(range(50, 90), "new"))
    async with replayed(log, shared, registry) as replay:
        for number in () if away else range(50, 90):
            await log.append(likes([number], "new"))
        assert await replay.caught_up(log.position().seq, 20)
        wanted = {
            *(f"e{n}" for n in range(10)),
            *(f"lost{n}" for n in range(10, 40)),
            *(f"new{n}" for n in range(50, 90)),
        }
        await until(lambda: liked(redis) == wanted)
        assert registry.get_sample_value("sella_replay_lag_entries") == 0
        counted = await shared.counts(bundle.id, ["u1"], [])
        assert counted.users == {"u1": Counts(80, 80)}
    await log.close()


async def test_a_late_positive_counts_once_though_its_impression_is_forgotten(
    redis: RedisServer, shared: RedisInteractions, bundle: Bundle, path: Path, time: FakeTime
) -> None:
    publish(redis, bundle)
    registry = CollectorRegistry()
    log = EventLog(path, LogLimits(ATTRIBUTION_S, 90 * DAY_S), time.clock(), InteractionMetrics(registry))
    await log.start()
    async with replayed(log, shared) as replay:
        shown = {"request_id": "r", "position": 1}
        await log.append([event("shown", None, **shown)])
        time.passes(ATTRIBUTION_S + 1)
        assert len(await log.sweep()) == 1
        assert await replay.caught_up(2, 20)
        with redis.client() as client:
            [key] = client.scan_iter(f"{KEYS.impression}*")
            assert 0 < client.ttl(key) <= ATTRIBUTION_S + 900
            client.delete(key)  # as when this time is over
        # More impressions than a user's outcomes are kept of: only the log knows.
        await log.append([event(f"no{n}", False, NOW + 1 + n) for n in range(120)])
        await log.append([event("late", True, NOW + 500, **shown), event("again", True, NOW + 600, **shown)])
        assert await replay.caught_up(log.position().seq, 20)
        counted = await shared.counts(bundle.id, ["u1"], ["i7"])
        assert counted.users["u1"] == counted.items["i7"] == Counts(121, 1)
        assert log.counts("user", ["u1"]) == {"u1": Counts(121, 1)}
        assert liked(redis) == {"late"}
        # A table that begins later counts the same, from the log.
        publish(redis, bundle, keep_s=0, again=True)
        with redis.client() as client:
            client.hset(KEYS.bundle(bundle.id).meta, "expires_at", "1")
        publish(redis, bundle)
        async with asyncio.timeout(20):
            while (await shared.counts(bundle.id, ["u1"], [])).users != {"u1": Counts(121, 1)}:
                await asyncio.sleep(0.02)
    await log.close()


async def test_likes_that_were_lost_in_redis_come_back_and_counts_stay_right(
    redis: RedisServer, shared: RedisInteractions, bundle: Bundle, log: EventLog
) -> None:
    publish(redis, bundle)
    await log.append([*likes(range(5)), event("other", user_id="u2")])
    async with replayed(log, shared) as replay:
        assert await replay.caught_up(6, 20)
        with redis.client() as client:
            client.delete(KEYS.likes + "u1", KEYS.outcomes + "u1", *client.scan_iter("*:n:*:u:u1"))
        await until(lambda: liked(redis) == {f"e{n}" for n in range(5)})
        async with asyncio.timeout(20):
            while (await shared.counts(bundle.id, ["u1", "u2"], ["i7"])).users != {
                "u1": Counts(5, 5),
                "u2": Counts(1, 1),
            }:
                await asyncio.sleep(0.02)
        assert (await shared.counts(bundle.id, [], ["i7"])).items == {"i7": Counts(1, 1)}


async def test_evicted_keys_are_noticed_and_replayed(bundle: Bundle, log: EventLog) -> None:
    with redis_server("--maxmemory-policy", "allkeys-random") as server:
        async with Redis.from_url(server.url, protocol=2) as client:
            shared = RedisInteractions(client, 90 * DAY_S, ATTRIBUTION_S)
            await log.append(likes(range(50)))
            registry = CollectorRegistry()
            async with replayed(log, shared, registry) as replay:
                assert await replay.caught_up(50, 20)
                await until(lambda: registry.get_sample_value("sella_replay_lost_total") == 0)
                with server.client() as plain:
                    plain.config_set("maxmemory", 1)
                    await until(lambda: int(plain.info("stats")["evicted_keys"]) > 0)
                    plain.config_set("maxmemory", 0)
                await until(lambda: (registry.get_sample_value("sella_replay_lost_total") or 0) > 0)
                await until(lambda: liked(server) == {f"e{n}" for n in range(50)})


async def test_a_damaged_live_key_stops_no_replay_and_is_begun_anew(
    redis: RedisServer, shared: RedisInteractions, bundle: Bundle, log: EventLog
) -> None:
    publish(redis, bundle)
    number_key = KEYS.bundle(bundle.id).counts
    with redis.client() as client:
        client.lpush(KEYS.likes + "u1", "x")
        client.set(KEYS.outcomes + "u1", "x")
        client.set(KEYS.deleted, "x")
        client.set(KEYS.deletions, "x")
        number = (client.hget(KEYS.bundle(bundle.id).meta, "counts") or b"").decode()
        client.hset(f"{number_key}{number}:u:u1", "impressions", "nonsense")
        client.set(f"{number_key}{number}:i:i1", "x")
    await log.append(likes(range(3)))
    async with replayed(log, shared) as replay:
        assert await replay.caught_up(3, 20)
        assert liked(redis) == {"e0", "e1", "e2"}
        assert (await shared.counts(bundle.id, ["u1"], ["i1"])).users == {"u1": Counts(3, 3)}
        _, seq = await log.delete("u1")
        assert await replay.caught_up(seq, 20)
        assert [user for user, _ in (await shared.deletions(float("-inf"))).users] == ["u1"]


async def test_only_new_deletions_are_read_and_those_of_an_earlier_version_are_numbered(
    redis: RedisServer, shared: RedisInteractions, log: EventLog
) -> None:
    with redis.client() as client:
        client.hset(KEYS.deleted, mapping={f"u{n}": str(NOW) for n in range(2500)})
    async with replayed(log, shared):
        with redis.client() as client:
            while len(await log.live([f"u{n}" for n in range(2500)])) < 2500:
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.2)
            client.config_resetstat()
            client.hset(KEYS.deleted, "later", str(NOW))  # a server of an earlier version deletes
            async with asyncio.timeout(20):
                while "later" not in await log.live(["later"]):
                    await asyncio.sleep(0.02)
            calls = {name: one["calls"] for name, one in client.info("commandstats").items()}
            assert "cmdstat_hgetall" not in calls
            read = await shared.deletions(float("-inf"), 1000)
            assert read.more and len(read.users) == 1000
            before = read.mark
            await shared.apply("x", [], None)
            assert (await shared.deletions(before, 5000)).mark > before
