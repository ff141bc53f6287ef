import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import structlog
from redis.asyncio import Redis
from structlog.testing import capture_logs

from service.errors import BundleRefusedError, ChangeRunningError
from service.features.client import open_client
from service.features.keys import Keys
from service.features.pointer import PointerWatch
from service.metrics.registry import Metrics
from tests.redis_server import RedisServer, redis_server

KEYS = Keys()
pytestmark = pytest.mark.anyio

OLD, NEW, LATER = "a" * 64, "b" * 64, "c" * 64


@asynccontextmanager
async def watching(
    server: RedisServer, on_change: Callable[[str], Awaitable[None]], metrics: Metrics | None = None
) -> AsyncIterator[Redis]:
    client = open_client(server.url, 5.0)
    store = None if metrics is None else metrics.store
    watch = PointerWatch(client, 0.01, on_change, structlog.get_logger(), served=OLD, metrics=store)
    task = asyncio.create_task(watch.run())
    yield client
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    await client.aclose()


async def test_each_new_bundle_is_told_once_whatever_becomes_of_redis() -> None:
    told: asyncio.Queue[str] = asyncio.Queue()
    with redis_server() as server:
        async with watching(server, told.put) as client:
            for pointer in (OLD, "no bundle", NEW):
                await client.set(KEYS.pointer, pointer)
                await asyncio.sleep(0.05)
            assert await asyncio.wait_for(told.get(), 30) == NEW
            server.restart_empty()
            with server.client() as other:
                other.set(KEYS.pointer, LATER)
            assert await asyncio.wait_for(told.get(), 30) == LATER
            await asyncio.sleep(0.05)
            assert told.empty()


async def test_a_pointer_that_could_not_be_followed_is_tried_again_with_growing_pauses_and_told() -> None:
    tries: list[float] = []
    copied = asyncio.Event()
    metrics = Metrics()

    def followed() -> float | None:
        return metrics.registry.get_sample_value("sella_pointer_followed")

    async def on_change(_: str) -> None:
        tries.append(time.monotonic())
        if not copied.is_set():
            raise BundleRefusedError("bundle bbbb is not in the folder; copy it there")

    with redis_server() as server, capture_logs() as log:
        async with watching(server, on_change, metrics) as client:
            await client.set(KEYS.pointer, NEW)
            async with asyncio.timeout(30):
                while len(tries) < 5:
                    await asyncio.sleep(0.01)
            assert followed() == 0
            copied.set()
            async with asyncio.timeout(30):
                while followed() == 0:
                    await asyncio.sleep(0.01)
            done = len(tries)
            await asyncio.sleep(0.1)
            assert len(tries) == done
    assert tries[4] - tries[3] > 2 * (tries[2] - tries[1])
    failed = [one for one in log if one["event"] == "pointer_not_followed"]
    assert len(failed) == done - 1 and "copy it there" in failed[0]["reason"]


async def test_a_pointer_that_moves_during_another_change_is_followed_after_it() -> None:
    asked: asyncio.Queue[str] = asyncio.Queue()
    running = True

    async def on_change(bundle_id: str) -> None:
        await asked.put(bundle_id)
        if running:
            raise ChangeRunningError("another change of bundles is under way")

    with redis_server() as server:
        async with watching(server, on_change) as client:
            await client.set(KEYS.pointer, NEW)
            for _ in range(2):
                assert await asyncio.wait_for(asked.get(), 30) == NEW
            running = False
            await asyncio.sleep(0.1)
            while not asked.empty():
                asked.get_nowait()
            await asyncio.sleep(0.1)
            assert asked.empty()  # taken, and so not told again
