"""Servers tell Redis what they serve, and keep house there."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import structlog
from redis.asyncio import Redis
from structlog.testing import capture_logs

from models.loading import Bundle
from service.features.client import open_client
from service.features.keys import BundleKeys, Keys
from service.features.presence import Presence
from service.metrics.registry import Metrics
from tests.redis_server import RedisServer, redis_server
from tests.service.published import publish
from tests.tiny import tiny_bundle

KEYS = Keys()
pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TELL_S", "HOUSE_S"):
        monkeypatch.setattr(f"service.features.presence.{name}", 0.02)


@asynccontextmanager
async def present(server: RedisServer, served: set[str], metrics: Metrics) -> AsyncIterator[Redis]:
    async with open_client(server.url, 5.0) as client:
        log = structlog.get_logger()
        presence = Presence(client, server.url, KEYS, lambda: served, metrics.store, log, 4500)
        task = asyncio.create_task(presence.run())
        try:
            yield client
        finally:
            while not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=0.5)


async def until_ttl(client: Redis, key: str) -> None:
    async with asyncio.timeout(20):
        while await client.ttl(key) < 0:
            await asyncio.sleep(0.02)


async def test_a_superseded_bundle_keeps_its_keys_until_the_last_server_leaves_it(
    redis: RedisServer, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    newer = tiny_bundle(tmp_path_factory.mktemp("newer") / "newer", seed=7)
    publish(redis, bundle)
    old = BundleKeys(bundle.id)
    served = {bundle.id}
    async with present(redis, served, Metrics()) as client:
        async with asyncio.timeout(20):
            while not await client.zcard(KEYS.serving):
                await asyncio.sleep(0.02)
        assert publish(redis, newer, keep_s=0).expiring == 0
        await asyncio.sleep(0.2)
        assert await client.ttl(old.items + "i0") == await client.ttl(old.meta) == -1
        served.clear()
        served.add(newer.id)
        await until_ttl(client, old.meta)
        assert await client.ttl(old.items + "i0") > 0 and await client.ttl(BundleKeys(newer.id).meta) == -1
    with redis.client() as plain:
        assert plain.zcard(KEYS.serving) == 0


async def test_a_redis_that_removes_keys_is_warned_of_at_the_start_and_when_that_changes() -> None:
    metrics = Metrics()
    with redis_server("--maxmemory-policy", "allkeys-lru") as server, capture_logs() as log:
        async with present(server, set(), metrics) as client:
            async with asyncio.timeout(20):
                while not metrics.registry.get_sample_value("sella_store_evicts"):
                    await asyncio.sleep(0.02)
                await asyncio.sleep(0.2)
                await client.config_set("maxmemory-policy", "noeviction")
                while metrics.registry.get_sample_value("sella_store_evicts"):
                    await asyncio.sleep(0.02)
    [warning] = [one for one in log if one["event"] == "store_evicts"]
    assert warning["policy"] == "allkeys-lru" and "noeviction" in warning["remedy"]


async def test_impressions_of_an_earlier_version_end_sooner(redis: RedisServer) -> None:
    with redis.client() as plain:
        plain.set(KEYS.impression + "old", "n1,1, ", ex=90 * 86_400)
        plain.set(KEYS.impression + "new", "n1,1, ", ex=60)
    async with present(redis, set(), Metrics()) as client:
        async with asyncio.timeout(20):
            while await client.ttl(KEYS.impression + "old") > 4500:
                await asyncio.sleep(0.02)
        assert await client.ttl(KEYS.impression + "new") <= 60


async def test_tables_of_counts_in_whose_place_others_began_are_removed(redis: RedisServer, bundle: Bundle) -> None:
    publish(redis, bundle)
    keys = BundleKeys(bundle.id)
    with redis.client() as plain:
        plain.hset(keys.meta, mapping={"counts": 10, "stale": 1})
        for number in (9, 10, 11):  # another may begin meanwhile
            plain.hset(f"{keys.counts}{number}:u:u1", "impressions", 1)
    async with present(redis, {bundle.id}, Metrics()) as client:
        async with asyncio.timeout(20):
            while await client.hexists(keys.meta, "stale"):  # type: ignore[misc]
                await asyncio.sleep(0.02)
        left = {key.decode().removeprefix(keys.counts) async for key in client.scan_iter(f"{keys.counts}*")}
    assert left == {"10:u:u1", "11:u:u1"}
