"""The routes over Redis: the same scores as from the bundle's tables, and likes that servers share."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from models.loading import Bundle
from models.scoring_model import ScoringModel
from service.engines.packed import PackedModel
from tests.redis_server import RedisServer
from tests.service.conftest import client_of, collaborators
from tests.service.direct import DirectEngine
from tests.service.interactions.test_live_scores import Steps
from tests.service.interactions.test_live_windows import assert_same, items, like, whole_history
from tests.service.published import publish
from tests.tiny import HISTORY_END

pytestmark = pytest.mark.anyio

ASKED = {"user_id": "u1", "candidates": ["i3", "i4", "i39", {"item_id": "new", "title": "Brand new"}]}


@asynccontextmanager
async def served(bundle: Bundle, model: ScoringModel, **settings: object) -> AsyncIterator[httpx.AsyncClient]:
    service = collaborators(bundle, DirectEngine(PackedModel(bundle, model, batch_tokens=1024)), **settings)
    async with client_of(service) as client, AsyncExitStack() as stack:
        await service.interactions.start()
        stack.push_async_callback(service.stores.close)
        stack.push_async_callback(service.bundles.current.store.close)
        stack.push_async_callback(service.interactions.close)
        yield client


async def ranked(client: httpx.AsyncClient, body: dict[str, Any] = ASKED) -> list[tuple[str, float, float, bool]]:
    answer = await client.post("/rank", json=body)
    assert answer.status_code == 200, answer.text
    return [(one["item_id"], one["score"], one["raw_score"], one["cold_item"]) for one in answer.json()["results"]]


async def test_scores_from_redis_are_those_from_the_tables_to_the_bit(
    redis: RedisServer, bundle: Bundle, model: ScoringModel, tmp_path: Path
) -> None:
    publish(redis, bundle)
    users = ("u0", "u1", "u18", "u19", "nobody")  # a long history, a usual one, cold ones, an unknown one
    async with served(bundle, model, interactions=tmp_path / "a") as embedded:
        expected = [await ranked(embedded, {**ASKED, "user_id": one}) for one in users]
    async with served(bundle, model, store=redis.url, redis_timeout_ms=5000, interactions=tmp_path / "b") as client:
        assert [await ranked(client, {**ASKED, "user_id": one}) for one in users] == expected
        told = (await client.get("/metrics")).text
        assert 'sella_store_lookup_seconds_count{source="redis"} 5.0' in told
        assert "redis: 20 users" in (await client.get("/readyz")).json()["store"]["detail"]


async def test_what_one_server_is_told_the_others_know(
    redis: RedisServer, bundle: Bundle, model: ScoringModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(redis, bundle)
    now = time.time()
    # Scores depend on the time since the like: every request is at the same moment.
    monkeypatch.setattr("service.scoring.time", SimpleNamespace(time=lambda: now, monotonic=time.monotonic))
    like = {"event_id": "e1", "user_id": "u1", "item_id": "i7", "label": True, "timestamp": now}
    async with (
        served(bundle, model, store=redis.url, redis_timeout_ms=5000, interactions=tmp_path / "a") as one,
        served(bundle, model, store=redis.url, redis_timeout_ms=5000, interactions=tmp_path / "b") as other,
    ):
        before = await ranked(other)
        answer = await one.post("/interactions", json={"interactions": [like]})
        assert answer.status_code == 200, answer.text
        after = before
        while after == before:  # a slow Redis is not waited for: it may take a moment
            after = await ranked(other)
        for told, asked in zip(after, await ranked(one), strict=True):
            assert told == (asked[0], pytest.approx(asked[1], abs=1e-6), *asked[2:])


async def eventually(compare: Callable[[], Awaitable[None]]) -> None:
    """Wait until a comparison holds: shared data reaches other servers after a moment."""
    end = time.monotonic() + 5
    while True:
        try:
            return await compare()
        except AssertionError:
            if time.monotonic() > end:
                raise
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("published_first", [True, False])
async def test_what_any_server_counts_is_in_the_scores_of_all_and_counts_once(
    redis: RedisServer,
    bundle: Bundle,
    model: ScoringModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    published_first: bool,
) -> None:
    """Scores equal the fusion computed here, also if the bundle is published after the logs are applied."""
    monkeypatch.setattr("service.interactions.replay.POLL_S", 0.05)
    monkeypatch.setattr("service.interactions.replay.TABLES_S", 0.05)
    monkeypatch.setattr("service.interactions.replay.DELETIONS_S", 3600.0)  # the other log never hears of it here
    if published_first:
        publish(redis, bundle)
    async with (
        served(bundle, model, store=redis.url, redis_timeout_ms=5000, interactions=tmp_path / "a") as one,
        served(bundle, model, store=redis.url, redis_timeout_ms=5000, interactions=tmp_path / "b") as other,
    ):
        first, second = Steps(one, bundle, model), Steps(other, bundle, model)
        second.offline, second.number = first.offline, 1000
        for user_id, item_id, label in (("u1", "i1", True), ("u2", "i1", False), ("u1", "i2", False)):
            await first.post(user_id, item_id, label)
            first.offline.saw(user_id, item_id, 1, int(label))
        await second.post("u1", "i1", True)
        first.offline.saw("u1", "i1", 1, 1)
        if not published_first:
            await asyncio.sleep(0.3)  # the logs are applied, and there is no table of counts yet
            publish(redis, bundle)
        for user_id in ("u1", "u2", "u5"):
            for steps in (first, second):
                await eventually(partial(steps.assert_scores, user_id))
        assert (await one.delete("/users/u1")).status_code == 200
        first.offline.forgets("u1")
        for steps in (first, second):
            await eventually(partial(steps.assert_scores, "u1"))


async def test_a_window_begins_where_it_would_for_the_ids_of_all_servers_likes(
    redis: RedisServer, bundle: Bundle, model: ScoringModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.interactions.replay.POLL_S", 0.05)
    monkeypatch.setattr("service.interactions.replay.TABLES_S", 0.05)
    monkeypatch.setattr("service.interactions.replay.DELETIONS_S", 0.05)
    publish(redis, bundle)
    async with (
        served(bundle, model, store=redis.url, redis_timeout_ms=5000, interactions=tmp_path / "a") as one,
        served(bundle, model, store=redis.url, redis_timeout_ms=5000, interactions=tmp_path / "b") as other,
        served(bundle, model, store=redis.url, redis_timeout_ms=5000, interactions=tmp_path / "c") as third,
    ):

        async def same(user_id: str, ids: list[str], *servers: httpx.AsyncClient) -> None:
            async def compare() -> None:
                for client in servers:
                    await assert_same(client, user_id, ids)

            await eventually(compare)

        liked = items(154)
        await like(one, "new", liked[:60], HISTORY_END + 1000)
        await like(other, "new", liked[60:101], HISTORY_END + 1060)
        await like(one, "new", liked[101:123], HISTORY_END + 1101)
        await like(other, "new", liked[123:], HISTORY_END + 1123)
        await same("new", liked, one, other, third)
        await like(other, "u0", items(131), HISTORY_END + 1000)
        await same("u0", [*whole_history(bundle, "u0"), *items(131)], one, other)
        with redis.client() as client:  # everything is lost, and replayed from both logs
            client.flushall()
        publish(redis, bundle)
        await same("new", liked, one, other)
        assert (await one.delete("/users/new")).status_code == 200
        await same("new", [], one, other)
        await like(other, "new", items(123, 3), time.time() + 5)
        await same("new", items(123, 3), one, other)


async def test_a_user_deleted_at_one_server_leaves_the_memory_of_the_others(
    redis: RedisServer, bundle: Bundle, model: ScoringModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.interactions.replay.DELETIONS_S", 0.05)
    publish(redis, bundle)
    async with (
        served(bundle, model, store=redis.url, redis_timeout_ms=5000, interactions=tmp_path / "a") as one,
        served(bundle, model, store=redis.url, redis_timeout_ms=5000, interactions=tmp_path / "b") as other,
    ):
        await ranked(other)
        assert "sella_served_scores 4.0" in (await other.get("/metrics")).text
        assert (await one.delete("/users/u1")).status_code == 200
        while "sella_served_scores 0.0" not in (await other.get("/metrics")).text:
            await asyncio.sleep(0.05)
