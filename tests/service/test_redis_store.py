import asyncio
import math
from collections.abc import Sequence

import numpy as np
import pytest
from redis.asyncio import Redis

from models.features import UserFeatures
from models.loading import Bundle
from service.features.keys import DELETED, LIKES, BundleKeys
from service.features.protocol import Features, Query
from service.features.redis import LookUpError
from service.interactions.live import USERS_AT_ONCE, KnownOutcome, Like, LiveUser
from service.metrics.registry import Metrics
from tests.redis_server import RedisServer
from tests.service.published import publish, redis_store

pytestmark = pytest.mark.anyio


def everything(bundle: Bundle) -> Query:
    users = frozenset(f"u{row}" for row in range(20)) | {"nobody"}
    return Query(users, frozenset(f"i{row}" for row in range(0, 40, 3)) | {"nothing"}, users)


def same_user(one: UserFeatures, other: UserFeatures) -> bool:
    def rest(user: UserFeatures) -> tuple[object, ...]:
        vector = None if user.vector_C is None else user.vector_C.tobytes()
        return user.user_id, vector, user.history, user.history_times, user.history_total, user.counts, user.since

    return rest(one) == rest(other)


def assert_same(found: Features, bundle: Bundle, query: Query) -> None:
    """Every field, to the bit, as the bundle's tables have it."""
    tables = bundle.tables()
    assert found.users.keys() == query.user_ids - {"nobody"}
    assert found.items.keys() == query.item_ids - {"nothing"}
    for user_id, user in found.users.items():
        stored = tables.user(user_id)
        assert stored is not None and same_user(user, stored)
        for one in user.history:
            item, part = tables.item(one), found.history_item(one)
            assert item is not None and part is not None
            assert (part.title, part.fold_C.tobytes()) == (item.title, item.fold_C.tobytes())
    for item_id, whole in found.items.items():
        item = tables.item(item_id)
        assert item is not None
        assert (whole.title, whole.trained, whole.counts) == (item.title, item.trained, item.counts)
        for name in ("collab_C", "fold_C", "semantic_D"):
            assert getattr(whole, name).tobytes() == getattr(item, name).tobytes()


async def test_a_look_up_answers_what_the_bundle_holds_to_the_bit(
    redis: RedisServer, redis_client: Redis, bundle: Bundle
) -> None:
    publish(redis, bundle)
    store = redis_store(redis_client, bundle, Metrics())
    query = everything(bundle)
    found = await store.look_up(bundle.id, query)
    assert_same(found, bundle, query)
    assert not any(live.likes or live.deleted_at for live in found.live.values())
    with pytest.raises(KeyError):
        await store.look_up("0" * 64, query)


async def test_a_look_up_is_one_round_trip_and_the_cache_leaves_only_the_script(
    redis: RedisServer, redis_client: Redis, bundle: Bundle
) -> None:
    publish(redis, bundle)
    metrics = Metrics()
    store = redis_store(redis_client, bundle, metrics, cache_bytes=10**7)
    query = everything(bundle)
    first = await store.look_up(bundle.id, query)  # teaches Redis the script
    with redis.client() as client:
        client.config_resetstat()
        again = await store.look_up(bundle.id, query)
        calls = {name: one["calls"] for name, one in client.info("commandstats").items()}
        assert calls["cmdstat_evalsha"] == 1
        assert "cmdstat_mget" not in calls
        assert again.items.keys() == first.items.keys()
        bare = redis_store(redis_client, bundle, metrics)
        client.config_resetstat()
        await bare.look_up(bundle.id, query)
        calls = {name: one["calls"] for name, one in client.info("commandstats").items()}
        assert (calls["cmdstat_evalsha"], calls["cmdstat_mget"]) == (1, 1)


async def test_likes_come_in_order_with_their_items_and_a_deleted_user_is_gone(
    redis: RedisServer, redis_client: Redis, bundle: Bundle
) -> None:
    publish(redis, bundle)
    with redis.client() as client:
        late, early = "event 2\0i31", "event 1\0i32"
        client.zadd(LIKES + "u1", {late: 1_800_000_000.123456, early: 1_800_000_000.0, "e\0gone": 1.0})
        client.hset(DELETED, "u2", "1800000001.25")
    found = await redis_store(redis_client, bundle, Metrics()).look_up(
        bundle.id, Query(frozenset({"u1", "u2", "u3"}), frozenset(), frozenset({"u1"}))
    )
    assert found.live["u1"].likes == (
        Like(1.0, "e", "gone"),
        Like(1_800_000_000.0, "event 1", "i32"),
        Like(1_800_000_000.123456, "event 2", "i31"),
    )
    assert {"i31", "i32"} <= found.history_items.keys() and "gone" not in found.history_items
    assert found.live["u2"] == LiveUser((), 1_800_000_001.25)
    assert found.users.keys() == {"u1", "u3"}
    assert "u3" not in found.live


async def test_a_deleted_users_record_is_used_if_all_of_it_is_from_after_the_deletion(
    redis: RedisServer, redis_client: Redis, bundle: Bundle
) -> None:
    publish(redis, bundle)
    since = float(bundle.tables().user_since_U[1])
    with redis.client() as client:
        client.hset(DELETED, mapping={"u1": repr(since - 0.5), "u2": repr(since), "u3": repr(since + 1)})
    users = frozenset({"u1", "u2", "u3"})
    found = await redis_store(redis_client, bundle, Metrics()).look_up(bundle.id, Query(users, frozenset(), users))
    assert found.users.keys() == {"u1"} and found.live.keys() == users
    stored = bundle.tables().user("u1")
    assert stored is not None and same_user(found.users["u1"], stored)


async def test_half_precision_changes_vectors_by_rounding_alone(
    redis: RedisServer, redis_client: Redis, bundle: Bundle
) -> None:
    publish(redis, bundle, precision="float16")
    found = await redis_store(redis_client, bundle, Metrics()).look_up(bundle.id, everything(bundle))
    for item_id, item in found.items.items():
        stored = bundle.tables().item(item_id)
        assert stored is not None
        np.testing.assert_allclose(item.semantic_D, stored.semantic_D, rtol=2**-11, atol=2**-24)


@pytest.mark.parametrize("damage", ["cut", "flipped", "another's", "another type", "another version"])
async def test_a_damaged_record_is_an_error_and_never_a_vector(
    redis: RedisServer, redis_client: Redis, bundle: Bundle, damage: str
) -> None:
    publish(redis, bundle)
    keys = BundleKeys(bundle.id)
    user = bundle.tables().user("u0")
    assert user is not None
    with redis.client() as client:
        for key, other in ((keys.items + "i3", keys.items + "i4"), (keys.users + "u0", keys.users + "u1")):
            record = client.get(key)
            assert isinstance(record, bytes)
            if damage == "cut":
                client.set(key, record[:-1])
            elif damage == "flipped":
                client.set(key, record[:-1] + bytes([record[-1] ^ 1]))
            elif damage == "another's":
                client.copy(other, key, replace=True)
            elif damage == "another type":
                client.delete(key)
                client.lpush(key, "x")
            else:
                client.set(key, b"\x09" + record[1:])
    store = redis_store(redis_client, bundle, Metrics())
    for query in (
        Query(frozenset(), frozenset({"i3"}), frozenset()),
        Query(frozenset({"u0"}), frozenset(), frozenset()),
    ):
        if (
            damage == "another type" and query.item_ids
        ):  # MGET tells nothing of such a key: absent, and the tables know it
            assert not (await store.look_up(bundle.id, query)).items
            continue
        with pytest.raises(LookUpError) as caught:
            await store.look_up(bundle.id, query)
        assert caught.value.reason == "error"


async def test_redis_without_the_whole_bundle_is_told_apart(
    redis: RedisServer, redis_client: Redis, bundle: Bundle
) -> None:
    store = redis_store(redis_client, bundle, Metrics())
    with pytest.raises(LookUpError) as caught:
        await store.look_up(bundle.id, everything(bundle))
    assert caught.value.reason == "bundle_missing"
    publish(redis, bundle)
    assert "20 users, 40 items in float32" in (await store.health()).detail
    with redis.client() as client:
        client.hset(BundleKeys(bundle.id).meta, "complete", "0")
    assert not (await store.health()).ready
    with pytest.raises(LookUpError) as caught:
        await store.look_up(bundle.id, everything(bundle))
    assert caught.value.reason == "bundle_missing"


async def test_times_are_exact_through_redis(redis: RedisServer, redis_client: Redis, bundle: Bundle) -> None:
    publish(redis, bundle)
    time = math.nextafter(1_800_000_000.1, math.inf)
    await redis_client.zadd(LIKES + "u1", {"e\0i1": time})
    found = await redis_store(redis_client, bundle, Metrics()).look_up(
        bundle.id, Query(frozenset({"u1"}), frozenset(), frozenset({"u1"}))
    )
    assert found.live["u1"].likes[0].timestamp == time


async def test_a_look_up_of_many_users_lets_other_tasks_run_while_it_reads_the_answer(
    redis: RedisServer, redis_client: Redis, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(redis, bundle)
    turns = [0]
    seen: list[int] = []

    async def other() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    def decoded(told: Sequence[bytes]) -> tuple[KnownOutcome, ...]:
        seen.append(turns[0])
        return ()

    monkeypatch.setattr("service.features.redis._outcomes", decoded)
    users = frozenset(f"u{row}" for row in range(4 * USERS_AT_ONCE))
    task = asyncio.create_task(other())
    await redis_store(redis_client, bundle, Metrics()).look_up(bundle.id, Query(users, frozenset(), users))
    task.cancel()
    assert len(seen) == len(users) and seen[-1] - seen[0] >= 3
