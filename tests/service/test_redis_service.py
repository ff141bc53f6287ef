"""The routes over Redis: the same scores as from the bundle's tables, and likes that servers share."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from models.loading import Bundle
from models.scoring_model import ScoringModel
from service.engines.packed import PackedModel
from service.features.choice import LATE_S
from service.features.keys import Keys
from service.settings import DAY_S
from tests.redis_server import RedisServer
from tests.service.conftest import client_of, collaborators
from tests.service.direct import DirectEngine
from tests.service.interactions.test_live_scores import Steps
from tests.service.interactions.test_live_windows import assert_same, items, like, whole_history
from tests.service.published import publish
from tests.tiny import HISTORY_END, tiny_bundle

pytestmark = pytest.mark.anyio
KEYS = Keys()

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


async def told(client: httpx.AsyncClient, event_id: str, user_id: str = "somebody", item_id: str = "i7") -> None:
    like = {"event_id": event_id, "user_id": user_id, "item_id": item_id, "label": True, "timestamp": time.time()}
    answer = await client.post("/interactions", json={"interactions": [like]})
    assert answer.status_code == 200, answer.text


async def given(client: httpx.AsyncClient, user_id: str = "somebody") -> int:
    answer = await client.post("/rank", json={"user_id": user_id, "candidates": ["i3"]})
    assert answer.status_code == 200, answer.text
    return int(answer.json()["history"]["given"])


async def test_a_like_is_in_another_servers_scores_within_a_second_of_its_answer(
    redis: RedisServer, bundle: Bundle, model: ScoringModel, tmp_path: Path
) -> None:
    """With Redis idle, and with Redis busy for longer than an answer waits for it."""
    publish(redis, bundle)
    async with (
        served(bundle, model, store=redis.url, redis_timeout_ms=5000, interactions=tmp_path / "a") as one,
        served(bundle, model, store=redis.url, redis_timeout_ms=5000, interactions=tmp_path / "b") as other,
    ):
        await given(other)
        for number in range(1, 13):
            with redis.paused() if number % 3 == 0 else nullcontext():
                await told(one, f"e{number}")  # answered although Redis stands still
            end = time.monotonic() + 1.0
            while (seen := await given(other)) < number and time.monotonic() < end:
                await asyncio.sleep(0.01)
            assert seen == number


@pytest.mark.parametrize("staged", [False, True])
async def test_a_canary_has_the_likes_of_other_servers_and_raises_no_alarm(
    redis: RedisServer, bundle: Bundle, model: ScoringModel, tmp_path: Path, staged: bool
) -> None:
    """A bundle that is served and that nobody published, or staged, beside one that is current in Redis."""
    canary = tiny_bundle(tmp_path / "canary", seed=7)
    publish(redis, bundle)
    if staged:
        publish(redis, canary, stage=True)
    async with (
        served(bundle, model, store=redis.url, redis_timeout_ms=5000, interactions=tmp_path / "a") as one,
        served(canary, model, store=redis.url, redis_timeout_ms=5000, interactions=tmp_path / "b") as other,
    ):
        before = await given(other, "u3")
        await told(one, "e1", "u3")
        while await given(other, "u3") == before:
            await asyncio.sleep(0.02)
        assert await given(other, "u3") == before + 1
        assert (await one.delete("/users/u3")).status_code == 200
        while await given(other, "u3"):
            await asyncio.sleep(0.02)
        await asyncio.sleep(1.2)  # the check in the background
        metrics = (await other.get("/metrics")).text
        assert "sella_store_up 1.0" in metrics
        assert f'sella_store_published{{bundle_id="{canary.id}"}} {float(staged)}' in metrics
        assert 'source="embedded"' in metrics and 'sella_store_lookup_seconds_count{source="embedded"} 0.0' in metrics


async def test_fleets_on_one_database_with_prefixes_of_their_own_share_nothing(
    redis: RedisServer, bundle: Bundle, model: ScoringModel, tmp_path: Path
) -> None:
    for prefix in ("films", "books"):
        publish(redis, bundle, keys=Keys(prefix))
    settings = {"store": redis.url, "redis_timeout_ms": 5000}
    async with (
        served(bundle, model, redis_prefix="films", interactions=tmp_path / "a", **settings) as films,
        served(bundle, model, redis_prefix="books", interactions=tmp_path / "b", **settings) as books,
        served(bundle, model, redis_prefix="films", interactions=tmp_path / "c", **settings) as other,
    ):
        before = await given(books, "u3")
        await told(films, "e1", "u3")
        while await given(other, "u3") == before:
            await asyncio.sleep(0.02)
        assert (await films.delete("/users/u4")).status_code == 200
        assert await given(books, "u3") == before and await given(books, "u4") > 0
        while await given(other, "u4"):
            await asyncio.sleep(0.02)
        with redis.client() as client:
            assert {key.partition(b":")[0] for key in client.scan_iter("*")} == {b"films", b"books"}


async def test_redis_keeps_an_impression_for_its_window_and_a_like_for_the_retention(
    redis: RedisServer, bundle: Bundle, model: ScoringModel, tmp_path: Path
) -> None:
    publish(redis, bundle)
    settings = {"store": redis.url, "redis_timeout_ms": 5000, "attribution_s": 60, "retention_days": 10}
    async with served(bundle, model, interactions=tmp_path / "a", **settings) as one:
        await told(one, "e1")
        with redis.client() as client:
            while not client.exists(KEYS.likes + "somebody"):
                await asyncio.sleep(0.02)
            [impression] = client.scan_iter(f"{KEYS.impression}*")
            assert 0 < client.ttl(impression) <= 60 + LATE_S
            assert client.ttl(KEYS.likes + "somebody") > 9 * DAY_S
