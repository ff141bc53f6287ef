import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from models.loading import Bundle
from service.features.client import open_client
from service.features.fallback import FAILURES, FallbackStore
from service.features.keys import BundleKeys, Keys
from service.features.protocol import Query
from service.metrics.registry import Metrics
from tests.redis_server import RedisServer, redis_server
from tests.service.published import fallback_store, publish, redis_store
from tests.service.test_redis_store import assert_same, everything

KEYS = Keys()
pytestmark = pytest.mark.anyio


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
async def store(redis_client: Redis, bundle: Bundle, metrics: Metrics) -> AsyncIterator[FallbackStore]:
    store = fallback_store(redis_client, bundle, metrics)
    yield store
    await store.close()


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


async def until(store: FallbackStore, word: str) -> None:
    async with asyncio.timeout(30):
        while word not in (await store.health()).detail:
            await asyncio.sleep(0.02)


async def test_redis_answers_while_it_can(
    redis: RedisServer, store: FallbackStore, bundle: Bundle, metrics: Metrics
) -> None:
    publish(redis, bundle)
    assert_same(await store.look_up(bundle.id, everything(bundle)), bundle, everything(bundle))
    assert value(metrics, "sella_store_lookup_seconds_count", source="redis") == 1
    assert value(metrics, "sella_store_lookup_seconds_count", source="embedded") == 0
    await until(store, "redis: 20 users")
    assert value(metrics, "sella_store_up") == 1


async def test_a_bundle_that_is_not_published_has_its_tables_and_what_is_live_and_no_alarm(
    redis: RedisServer, store: FallbackStore, bundle: Bundle, metrics: Metrics
) -> None:
    with redis.client() as client:
        client.zadd(KEYS.likes + "u1", {"e\0i31": 1_800_000_000.0})
        client.hset(KEYS.deleted, "u2", "1800000001")
    query = everything(bundle)
    found = await store.look_up(bundle.id, query)
    assert found.users.keys() == query.user_ids - {"nobody", "u2"} and found.items.keys() == query.item_ids - {
        "nothing"
    }
    assert [one.item_id for one in found.live["u1"].likes] == ["i31"] and found.history_item("i31") is not None
    await until(store, "does not hold")
    assert (await store.health()).ready and (await store.health()).detail.startswith("embedded tables, because")
    assert value(metrics, "sella_store_up") == 1
    assert value(metrics, "sella_store_published", bundle_id=bundle.id) == 0
    assert not any(value(metrics, "sella_store_fallbacks_total", reason=one) for one in ("timeout", "down", "error"))
    assert value(metrics, "sella_store_filled_total", kind="item") == 0
    publish(redis, bundle)
    await until(store, "redis: 20 users")
    await store.look_up(bundle.id, query)
    assert value(metrics, "sella_store_published", bundle_id=bundle.id) == 1
    assert value(metrics, "sella_store_lookup_seconds_count", source="embedded") == 0


async def test_what_was_evicted_comes_from_the_tables_and_who_was_deleted_does_not(
    redis: RedisServer, store: FallbackStore, bundle: Bundle, metrics: Metrics
) -> None:
    publish(redis, bundle)
    keys, stored = BundleKeys(bundle.id), bundle.tables().user("u1")
    assert stored is not None
    with redis.client() as client:
        client.delete(keys.items + "i3", keys.users + "u1", *(keys.items + one for one in stored.history))
        client.delete(keys.users + "u2", keys.users + "u4")
        client.hset(KEYS.deleted, mapping={"u2": "1800000000.0", "u4": "1000000000.0"})  # of u4 all is from after it
    users = frozenset({"u1", "u2", "u3", "u4"})
    found = await store.look_up(bundle.id, Query(users, frozenset({"i3", "i4", "nothing"}), users))
    assert found.users.keys() == {"u1", "u3", "u4"}
    assert found.items.keys() == {"i3", "i4"}
    assert all(found.history_item(one) is not None for one in stored.history)
    assert value(metrics, "sella_store_filled_total", kind="user") == 2
    assert value(metrics, "sella_store_filled_total", kind="item") >= 1
    assert value(metrics, "sella_store_lookup_seconds_count", source="redis") == 1


async def test_a_damaged_record_costs_itself_alone_and_publish_repairs_it(
    redis: RedisServer, store: FallbackStore, bundle: Bundle, metrics: Metrics
) -> None:
    publish(redis, bundle)
    keys = BundleKeys(bundle.id)
    with redis.client() as client:
        client.setrange(keys.items + "i3", 60, b"damaged")
        client.setrange(keys.users + "u1", 20, b"damaged")
        client.set(keys.users + "u2", "short")
        client.zadd(KEYS.likes + "u3", {"e\0i31": 1_800_000_000.0})
    query = everything(bundle)
    with capture_logs() as log:
        for _ in range(2 * FAILURES):
            found = await store.look_up(bundle.id, query)
            assert_same(found, bundle, query)
            assert [one.item_id for one in found.live["u3"].likes] == ["i31"]
    assert value(metrics, "sella_store_up") == 1
    assert value(metrics, "sella_store_fallbacks_total", reason="error") == 0
    assert value(metrics, "sella_store_damaged_total", kind="user") == 2 * 2 * FAILURES
    assert value(metrics, "sella_store_damaged_total", kind="item") >= 2 * FAILURES
    assert value(metrics, "sella_store_lookup_seconds_count", source="redis") == 2 * FAILURES
    assert [one["kinds"] for one in log if one["event"] == "store_damaged"] == [["item", "user"]]
    published = publish(redis, bundle)
    assert (published.repaired, published.current) == (3, True)
    assert not (await redis_store(store._redis._client, bundle, metrics).look_up(bundle.id, query)).damaged
    again = publish(redis, bundle)
    assert (again.repaired, again.already) == (0, True)


async def test_what_is_no_number_or_text_in_redis_costs_the_answer_nothing(
    redis: RedisServer, store: FallbackStore, bundle: Bundle, metrics: Metrics
) -> None:
    publish(redis, bundle)
    with redis.client() as client:
        client.hset(KEYS.deleted, "u1", "nonsense")
        assert_same(await store.look_up(bundle.id, everything(bundle)), bundle, everything(bundle))
        assert value(metrics, "sella_store_damaged_total", kind="deletion") == 1
        client.hdel(KEYS.deleted, "u1")
        client.hset(BundleKeys(bundle.id).meta, "users", b"\xff")
        await until(store, "redis: \ufffd users")
        client.delete(BundleKeys(bundle.id).meta)
        client.set(BundleKeys(bundle.id).meta, "x")
        assert_same(await store.look_up(bundle.id, everything(bundle)), bundle, everything(bundle))
        assert publish(redis, bundle).current
        await until(store, "redis: 20 users")  # the check went on


async def test_a_paused_redis_costs_some_requests_its_limit_and_then_none_and_comes_back(
    redis: RedisServer, bundle: Bundle, metrics: Metrics
) -> None:
    publish(redis, bundle)
    client = open_client(redis.url, 0.1)
    store = fallback_store(client, bundle, metrics, limit_s=0.1)
    query = everything(bundle)
    await store.look_up(bundle.id, query)
    with redis.paused():
        for _ in range(50):
            assert_same(await store.look_up(bundle.id, query), bundle, query)
        assert value(metrics, "sella_store_fallbacks_total", reason="timeout") == 50
        assert "because" in (await store.health()).detail
        assert value(metrics, "sella_store_up") == 0
    await until(store, "redis: 20 users")
    for number in range(5):  # no reply of before the pause is taken for one of now
        asked = Query(frozenset({f"u{number}"}), frozenset({f"i{number}"}), frozenset())
        found = await store.look_up(bundle.id, asked)
        assert (found.users.keys(), found.items.keys()) == ({f"u{number}"}, {f"i{number}"})
    assert value(metrics, "sella_store_lookup_seconds_count", source="redis") >= 5
    await store.close()
    await client.aclose()


async def test_a_redis_that_dies_and_comes_back_empty_and_is_filled_again(bundle: Bundle, metrics: Metrics) -> None:
    with redis_server() as server:
        publish(server, bundle)
        client = open_client(server.url, 5.0)
        store = fallback_store(client, bundle, metrics)
        query = everything(bundle)
        await store.look_up(bundle.id, query)
        server.kill()
        for _ in range(FAILURES + 2):
            assert_same(await store.look_up(bundle.id, query), bundle, query)
        assert value(metrics, "sella_store_fallbacks_total", reason="down") == FAILURES + 2
        server.start()
        await until(store, "does not hold")
        assert_same(await store.look_up(bundle.id, query), bundle, query)
        publish(server, bundle)
        await until(store, "redis: 20 users")
        assert_same(await store.look_up(bundle.id, query), bundle, query)
        assert value(metrics, "sella_store_lookup_seconds_count", source="redis") == 3
        await store.close()
        await client.aclose()


async def test_look_ups_that_were_cancelled_leave_the_others_their_own_replies(
    redis: RedisServer, store: FallbackStore, bundle: Bundle
) -> None:
    publish(redis, bundle)

    async def ask(number: int) -> None:
        user, item = f"u{number % 20}", f"i{number % 35}"
        found = await store.look_up(bundle.id, Query(frozenset({user}), frozenset({item}), frozenset()))
        assert (found.users.keys(), found.items.keys()) == ({user}, {item})

    tasks = [asyncio.create_task(ask(number)) for number in range(120)]
    for number, task in enumerate(tasks):
        if number % 3 == 0:
            await asyncio.sleep(0)
            task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(one is None or isinstance(one, asyncio.CancelledError) for one in results)
    assert sum(one is None for one in results) >= 80
