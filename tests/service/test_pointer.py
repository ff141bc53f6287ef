import asyncio
from contextlib import suppress

import pytest
import structlog

from service.errors import ChangeRunningError
from service.features.client import open_client
from service.features.keys import POINTER
from service.features.pointer import PointerWatch
from tests.redis_server import redis_server

pytestmark = pytest.mark.anyio

OLD, NEW, LATER = "a" * 64, "b" * 64, "c" * 64


async def test_each_new_bundle_is_told_once_whatever_becomes_of_redis() -> None:
    told: asyncio.Queue[str] = asyncio.Queue()

    async def on_change(bundle_id: str) -> None:
        await told.put(bundle_id)
        if bundle_id == NEW:
            raise RuntimeError("refused")

    with redis_server() as server:
        client = open_client(server.url, 5.0)
        watch = asyncio.create_task(PointerWatch(client, 0.01, on_change, structlog.get_logger(), served=OLD).run())
        for pointer in (OLD, "no bundle", NEW):
            await client.set(POINTER, pointer)
            await asyncio.sleep(0.05)
        assert await asyncio.wait_for(told.get(), 30) == NEW
        server.restart_empty()
        with server.client() as other:
            other.set(POINTER, LATER)
        assert await asyncio.wait_for(told.get(), 30) == LATER
        await asyncio.sleep(0.05)
        assert told.empty()
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
        await client.aclose()


async def test_a_pointer_that_moves_during_another_change_is_followed_after_it() -> None:
    asked: asyncio.Queue[str] = asyncio.Queue()
    running = True

    async def on_change(bundle_id: str) -> None:
        await asked.put(bundle_id)
        if running:
            raise ChangeRunningError("another change of bundles is under way")

    with redis_server() as server:
        client = open_client(server.url, 5.0)
        await client.set(POINTER, NEW)
        watch = asyncio.create_task(PointerWatch(client, 0.01, on_change, structlog.get_logger(), served=OLD).run())
        for _ in range(2):
            assert await asyncio.wait_for(asked.get(), 30) == NEW
        running = False
        await asyncio.sleep(0.1)
        while not asked.empty():
            asked.get_nowait()
        await asyncio.sleep(0.1)
        assert asked.empty()  # taken, and so not told again
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
        await client.aclose()
