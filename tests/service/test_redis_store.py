import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis

from models.features import UserFeatures
from models.fusion import Counts
from models.loading import Bundle
from service.features.keys import BundleKeys, Keys
from service.features.protocol import Features, Query
from service.interactions.counts import NOTHING_COUNTED, Counted
from service.interactions.live import USERS_AT_ONCE, KnownOutcome, Like, LiveUser
from service.metrics.registry import Metrics
from tests.redis_server import RedisServer
from tests.service.published import publish, redis_store
from tests.tiny import tiny_bundle

KEYS = Keys()
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
        client.zadd(KEYS.likes + "u1", {late: 1_800_000_000.123456, early: 1_800_000_000.0, "e\0gone": 1.0})
        client.hset(KEYS.deleted, "u2", "1800000001.25")
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
        client.hset(KEYS.deleted, mapping={"u1": repr(since - 0.5), "u2": repr(since), "u3": repr(since + 1)})
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


@pytest.mark.parametrize(
    "damage", ["cut", "short", "flipped", "lengths", "another's", "another type", "another version"]
)
async def test_a_damaged_record_is_left_out_and_told_and_costs_nothing_else(
    redis: RedisServer, redis_client: Redis, bundle: Bundle, damage: str
) -> None:
    publish(redis, bundle)
    keys = BundleKeys(bundle.id)
    with redis.client() as client:
        for key, other in ((keys.items + "i3", keys.items + "i4"), (keys.users + "u0", keys.users + "u1")):
            damage_record(client, key, other, damage)
    query = everything(bundle)
    found = await redis_store(redis_client, bundle, Metrics()).look_up(bundle.id, query)
    assert found.users.keys() == query.user_ids - {"u0", "nobody"}
    assert found.items.keys() == query.item_ids - {"i3", "nothing"}
    if damage not in ("cut", "flipped"):  # these are behind what a history needs, which has a checksum of its own
        assert "i3" not in found.history_items
    # MGET tells nothing of a key of another type: it is absent, and the tables know the item.
    assert {"user", "item"} >= set(found.damaged) >= ({"user"} if damage == "another type" else {"user", "item"})
    rest = Query(query.user_ids - {"u0"}, query.item_ids - {"i3"}, frozenset())
    assert not (await redis_store(redis_client, bundle, Metrics()).look_up(bundle.id, rest)).damaged


def damage_record(client: SyncRedis, key: str, other: str, damage: str) -> None:
    record = client.get(key)
    assert isinstance(record, bytes)
    if damage == "cut":
        client.set(key, record[:-1])
    elif damage == "short":
        client.set(key, record[:3])
    elif damage == "flipped":
        client.set(key, record[:-1] + bytes([record[-1] ^ 1]))
    elif damage == "lengths":
        client.set(key, record[:2] + b"\xff\xff\xff\xff" + record[6:])
    elif damage == "another's":
        client.copy(other, key, replace=True)
    elif damage == "another type":
        client.delete(key)
        client.lpush(key, "x")
    else:
        client.set(key, b"\x09" + record[1:])


async def test_what_is_live_of_other_users_does_not_suffer_from_a_damaged_key(
    redis: RedisServer, redis_client: Redis, bundle: Bundle
) -> None:
    publish(redis, bundle)
    with redis.client() as client:
        for user in ("u1", "u2"):
            client.zadd(KEYS.likes + user, {"e\0i31": 1_800_000_000.0})
        client.zadd(KEYS.likes + "u1", {b"\xff\0i32": 1.0})
        client.lpush(KEYS.likes + "u3", "x")
        client.set(KEYS.outcomes + "u4", "x")
        client.zadd(KEYS.outcomes + "u5", {b"\xff": 1.0})
        client.hset(KEYS.deleted, mapping={"u6": "nonsense", "u7": "1800000001"})
        number = (client.hget(BundleKeys(bundle.id).meta, "counts") or b"").decode()
        table = BundleKeys(bundle.id).counts + number
        client.hset(f"{table}:i:i3", mapping={"impressions": "nonsense", "positives": 1})
        client.hset(f"{table}:i:i4", mapping={"impressions": 2, "positives": 1})
        client.set(f"{table}:u:u1", "x")
    users = frozenset(f"u{one}" for one in range(1, 9))
    asked = Query(users, frozenset({"i3", "i4"}), users, frozenset({"i3", "i4"}))
    found = await redis_store(redis_client, bundle, Metrics()).look_up(bundle.id, asked)
    assert found.users.keys() == users - {"u7"}
    assert [len(found.live[one].likes) for one in ("u1", "u2", "u3")] == [1, 1, 0]
    assert found.live["u7"].deleted_at == 1_800_000_001.0 and found.live["u6"].deleted_at is None
    assert found.counted == Counted(True, {}, {"i4": Counts(2, 1)})
    assert set(found.damaged) == {"likes", "outcomes", "deletion", "counts"}


async def test_redis_without_the_whole_bundle_tells_what_is_live_and_no_record(
    redis: RedisServer, redis_client: Redis, bundle: Bundle
) -> None:
    store = redis_store(redis_client, bundle, Metrics())
    with redis.client() as client:
        client.zadd(KEYS.likes + "u1", {"e\0i31": 1_800_000_000.0})
        client.hset(KEYS.deleted, "u2", "1800000001.25")
    for _ in range(2):
        found = await store.look_up(bundle.id, everything(bundle))
        assert not (found.held or found.users or found.items or found.history_items or found.counted.live)
        assert [one.item_id for one in found.live["u1"].likes] == ["i31"]
        assert found.live["u2"].deleted_at == 1_800_000_001.25
    publish(redis, bundle)
    assert "20 users, 40 items in float32" in (await store.health()).detail
    assert (await store.look_up(bundle.id, everything(bundle))).items
    with redis.client() as client:
        client.hset(BundleKeys(bundle.id).meta, "complete", "0")
    assert not (await store.health()).ready
    assert not (await store.look_up(bundle.id, everything(bundle))).users


async def test_a_bundle_that_is_not_published_gets_the_counts_of_one_whose_own_end_at_the_same_moment(
    redis: RedisServer, redis_client: Redis, bundle: Bundle, tmp_path: Path
) -> None:
    until = bundle.manifest.counted_until
    same = tiny_bundle(tmp_path / "same", seed=7, counted_until=until)
    later = tiny_bundle(tmp_path / "later", seed=7, counted_until=until + 1)
    publish(redis, bundle)
    with redis.client() as client:
        number = (client.hget(BundleKeys(bundle.id).meta, "counts") or b"").decode()
        client.hset(f"{BundleKeys(bundle.id).counts}{number}:i:i4", mapping={"impressions": 2, "positives": 1})
    asked = Query(frozenset({"u1"}), frozenset({"i4"}), frozenset(), frozenset({"i4"}))
    told = []
    for one in (same, later):
        found = await redis_store(redis_client, one, Metrics()).look_up(one.id, asked)
        told.append(found.counted)
        assert not found.held
    assert told == [Counted(True, {}, {"i4": Counts(2, 1)}), NOTHING_COUNTED]


async def test_times_are_exact_through_redis(redis: RedisServer, redis_client: Redis, bundle: Bundle) -> None:
    publish(redis, bundle)
    time = math.nextafter(1_800_000_000.1, math.inf)
    await redis_client.zadd(KEYS.likes + "u1", {"e\0i1": time})
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

    def decoded(told: Sequence[bytes], damaged: list[str]) -> tuple[KnownOutcome, ...]:
        seen.append(turns[0])
        return ()

    monkeypatch.setattr("service.features.redis._outcomes", decoded)
    users = frozenset(f"u{row}" for row in range(4 * USERS_AT_ONCE))
    task = asyncio.create_task(other())
    await redis_store(redis_client, bundle, Metrics()).look_up(bundle.id, Query(users, frozenset(), users))
    task.cancel()
    assert len(seen) == len(users) and seen[-1] - seen[0] >= 3
