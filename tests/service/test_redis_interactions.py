import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from redis.asyncio import Redis

from models.features import MAX_OUTCOMES
from models.fusion import Counts
from models.loading import Bundle
from service.features.keys import BundleKeys, Keys
from service.features.protocol import Query
from service.interactions.counts import Counted
from service.interactions.event import EntryKind, Interaction, LogEntry
from service.interactions.live import MAX_LIKES, KnownOutcome, LiveUser, impression_name
from service.interactions.redis import RedisInteractions
from service.interactions.shared import Impression, SharedStoreError
from service.metrics.registry import Metrics
from tests.redis_server import RedisServer
from tests.service.published import publish, redis_store
from tests.tiny import tiny_bundle

KEYS = Keys()
pytestmark = pytest.mark.anyio

NOW = 1_800_000_000.0


@pytest.fixture
def shared(redis_client: Redis) -> RedisInteractions:
    return RedisInteractions(redis_client, 3600)


def entry(
    seq: int, label: bool | None, kind: EntryKind = "event", *, user: str = "u1", item: str = "i1", **rest: object
) -> LogEntry:
    """An entry of impression r1 at position 0, unless `rest` says otherwise."""
    fields: dict[str, object] = {"event_id": f"e{seq}", "timestamp": NOW + seq, "request_id": "r1", "position": 0}
    return LogEntry(seq, kind, Interaction(user_id=user, item_id=item, label=label, **{**fields, **rest}))  # type: ignore[arg-type]


async def live(client: Redis, bundle: Bundle, user_id: str = "u1") -> LiveUser:
    store = redis_store(client, bundle, Metrics())
    return (await store.look_up(bundle.id, Query(frozenset({user_id}), frozenset(), frozenset({user_id})))).live[
        user_id
    ]


async def test_entries_applied_are_part_of_the_next_look_up_and_counted(
    redis: RedisServer, redis_client: Redis, shared: RedisInteractions, bundle: Bundle
) -> None:
    publish(redis, bundle)
    assert await shared.applied(["log"]) == [0]
    await shared.apply("log", [entry(3, None), entry(4, True), entry(7, False, item="i2", position=1)])
    assert await shared.applied(["log"]) == [7]
    assert [like.event_id for like in (await live(redis_client, bundle)).likes] == ["e4"]
    counted = await shared.counts(bundle.id, ["u1", "nobody"], ["i1", "i2", "i3"])
    assert counted == Counted(True, {"u1": Counts(2, 1)}, {"i1": Counts(1, 1), "i2": Counts(1, 0)})
    asked = Query(frozenset({"u1", "nobody"}), frozenset(), frozenset(), frozenset({"i1", "i2", "i3"}))
    assert (await redis_store(redis_client, bundle, Metrics()).look_up(bundle.id, asked)).counted == counted


@pytest.mark.parametrize(
    ("entries", "counted"),
    [
        ([entry(1, None)], {}),
        ([entry(1, None), entry(1, None, "expiry")], {"u1": Counts(1, 0)}),
        ([entry(1, None), entry(1, None, "expiry"), entry(2, True)], {"u1": Counts(1, 1)}),
        ([entry(1, True), entry(2, None)], {"u1": Counts(1, 1)}),
        ([entry(1, True), entry(2, False)], {"u1": Counts(1, 1)}),
        ([entry(1, False), entry(2, True), entry(3, True)], {"u1": Counts(1, 1)}),
    ],
)
async def test_an_impression_is_counted_once_whatever_comes_twice(
    redis: RedisServer,
    shared: RedisInteractions,
    bundle: Bundle,
    entries: Sequence[LogEntry],
    counted: dict[str, Counts],
) -> None:
    publish(redis, bundle)
    for _ in range(3):
        await shared.apply("log", entries)
    assert (await shared.counts(bundle.id, ["u1"], [])).users == counted


async def test_any_order_and_repetition_ends_the_same(
    redis: RedisServer, redis_client: Redis, shared: RedisInteractions, bundle: Bundle
) -> None:
    publish(redis, bundle)
    rng = random.Random(0)
    entries = [entry(seq, rng.choice([None, False, True]), position=seq % 5, item=f"i{seq % 5}") for seq in range(20)]
    ends = []
    for _ in range(5):
        await redis_client.flushdb()
        publish(redis, bundle)
        mixed = rng.sample(entries * 2, 40)
        for first in range(0, 40, 8):
            await shared.apply("log", mixed[first : first + 8])
        ends.append(
            (await live(redis_client, bundle), await shared.counts(bundle.id, ["u1"], [f"i{one}" for one in range(5)]))
        )
    assert ends[0][0].likes
    assert all(end == ends[0] for end in ends)


async def test_an_impression_has_one_like_its_earliest(
    redis: RedisServer, redis_client: Redis, shared: RedisInteractions, bundle: Bundle
) -> None:
    publish(redis, bundle)
    await shared.apply("log", [entry(5, True), entry(2, True), entry(9, True), entry(8, True, position=1)])
    assert [like.event_id for like in (await live(redis_client, bundle)).likes] == ["e2", "e8"]


async def test_the_newest_likes_are_kept(
    redis: RedisServer, redis_client: Redis, shared: RedisInteractions, bundle: Bundle
) -> None:
    publish(redis, bundle)
    await shared.apply("log", [entry(seq, True, position=seq) for seq in range(1, MAX_LIKES + 21)])
    await shared.apply("log", [entry(1, True, position=1)])
    likes = (await live(redis_client, bundle)).likes
    assert [like.event_id for like in likes] == [f"e{seq}" for seq in range(21, MAX_LIKES + 21)]


async def test_outcomes_have_the_state_and_time_of_their_impression(
    redis: RedisServer, redis_client: Redis, shared: RedisInteractions, bundle: Bundle
) -> None:
    publish(redis, bundle)
    first = [
        entry(5, False),
        entry(6, None, position=1),  # pending: no outcome yet
        entry(7, False, item="i2", position=2),
        entry(3, True, item="i3", position=3),
    ]
    await shared.apply("log", first)
    names = {item: impression_name(impression(item, place).impression_id) for place, item in ((0, "i1"), (2, "i2"))}
    names["i3"] = impression_name(impression("i3", 3).impression_id)
    i2, i3 = KnownOutcome(NOW + 7, names["i2"], "i2", False), KnownOutcome(NOW + 3, names["i3"], "i3", True)
    before = (i3, KnownOutcome(NOW + 5, names["i1"], "i1", False), i2)
    assert (await live(redis_client, bundle)).outcomes == before
    # A request that brings its own history also gets the outcomes.
    asked = Query(frozenset({"u1"}), frozenset(), frozenset())
    told = (await redis_store(redis_client, bundle, Metrics()).look_up(bundle.id, asked)).live["u1"]
    assert (told.outcomes, told.likes) == (before, ())
    # The impression was shown earlier, and its outcome becomes positive.
    await shared.apply("other", [entry(8, True), entry(1, None)])
    after = (KnownOutcome(NOW + 1, names["i1"], "i1", True), i3, i2)
    assert (await live(redis_client, bundle)).outcomes == after
    await shared.apply("log", first)
    assert (await live(redis_client, bundle)).outcomes == after


async def test_the_newest_outcomes_are_kept(
    redis: RedisServer, redis_client: Redis, shared: RedisInteractions, bundle: Bundle
) -> None:
    publish(redis, bundle)
    await shared.apply("log", [entry(seq, seq % 2 == 0, position=seq) for seq in range(1, MAX_OUTCOMES + 21)])
    await shared.apply("log", [entry(1, True, position=1)])
    outcomes = (await live(redis_client, bundle)).outcomes
    assert [(one.shown, one.positive) for one in outcomes] == [
        (NOW + seq, seq % 2 == 0) for seq in range(21, MAX_OUTCOMES + 21)
    ]


async def test_a_deletion_leaves_the_tombstone_alone_and_what_was_before_it_stays_out(
    redis: RedisServer, redis_client: Redis, shared: RedisInteractions, bundle: Bundle
) -> None:
    publish(redis, bundle)
    await shared.apply("log", [entry(1, True), entry(2, None, position=1)])
    await shared.apply("log", [entry(50, None, "deletion")])
    with redis.client() as client:
        assert client.exists(BundleKeys(bundle.id).users + "u1") == 0
        assert {key for key in client.scan_iter("*") if b"u1" in key.split(b":")} == set()
        assert client.hget(KEYS.deleted, "u1") == str(NOW + 50).encode()
    assert (await shared.deletions(-math.inf)).users == [("u1", NOW + 50)]
    await shared.apply("another log", [entry(3, True), entry(2, None, "expiry", position=1)])
    assert await live(redis_client, bundle) == LiveUser((), NOW + 50)
    await shared.apply("log", [entry(51, True)])
    await shared.apply("log", [entry(50, None, "deletion")])  # again, as from another server's log
    left = await live(redis_client, bundle)
    assert [like.event_id for like in left.likes] == ["e51"]
    assert [(one.shown, one.positive) for one in left.outcomes] == [(NOW + 51, True)]


async def test_a_deletion_leaves_the_records_of_bundles_that_learned_from_later_rows_alone(
    redis: RedisServer, shared: RedisInteractions, bundle: Bundle, tmp_path: Path
) -> None:
    later = tiny_bundle(tmp_path / "later", rest_seed=4, since=NOW + 60)
    for one in (bundle, later):
        publish(redis, one)
    with redis.client() as client:
        client.lpush(BundleKeys(bundle.id).users + "u2x", "damaged")
        await shared.apply("log", [entry(50, None, "deletion"), entry(51, None, "deletion", user="u2x")])
        assert not client.exists(BundleKeys(bundle.id).users + "u1", BundleKeys(bundle.id).users + "u2x")
        assert client.exists(BundleKeys(later.id).users + "u1")
        await shared.apply("log", [entry(61, None, "deletion")])
        assert not client.exists(BundleKeys(later.id).users + "u1")


async def test_an_impression_shown_before_a_deletion_is_no_outcome_after_it(
    redis: RedisServer, redis_client: Redis, shared: RedisInteractions, bundle: Bundle
) -> None:
    publish(redis, bundle)
    await shared.apply("log", [entry(1, None), entry(60, None), entry(50, None, "deletion"), entry(61, True)])
    assert (await live(redis_client, bundle)).outcomes == ()


async def test_everything_but_deletions_ends_some_day(redis: RedisServer, shared: RedisInteractions) -> None:
    await shared.apply("log", [entry(1, True), entry(2, True, user="u2"), entry(9, None, "deletion", user="u2")])
    with redis.client() as client:
        lasting = {key for key in client.scan_iter("*") if client.ttl(key) == -1}
        assert lasting == {b"sella:live:applied", b"sella:live:deleted", b"sella:live:deletions"}


async def test_a_redis_that_refuses_takes_nothing_and_says_so(
    redis: RedisServer, shared: RedisInteractions, bundle: Bundle
) -> None:
    publish(redis, bundle)
    await shared.apply("log", [entry(1, True)])
    with redis.client() as client:
        client.config_set("maxmemory", 1)
        try:
            with pytest.raises(SharedStoreError, match="does not take"):
                await shared.apply("log", [entry(2, True, position=1), entry(3, True, position=2)])
        finally:
            client.config_set("maxmemory", 0)
    assert await shared.applied(["log"]) == [1]
    assert (await shared.counts(bundle.id, ["u1"], [])).users == {"u1": Counts(1, 1)}


async def test_entries_for_another_place_are_refused_whole(
    redis: RedisServer, shared: RedisInteractions, bundle: Bundle
) -> None:
    publish(redis, bundle)
    await shared.apply("log", [entry(1, True)], 0)
    for after in (0, 2):
        with pytest.raises(SharedStoreError, match="another place"):
            await shared.apply("log", [entry(2, True, position=1)], after)
    await shared.apply("log", [entry(2, True, position=1)], 1)
    assert (await shared.counts(bundle.id, ["u1"], [])).users == {"u1": Counts(2, 2)}


async def test_what_is_no_number_in_redis_costs_itself_alone(redis_client: Redis, shared: RedisInteractions) -> None:
    await redis_client.hset(KEYS.applied, "log", "nonsense")  # type: ignore[misc]
    await redis_client.hset(KEYS.deleted, "secret-user", "nonsense")  # type: ignore[misc]
    assert await shared.applied(["log"]) == [0]  # so the log is applied again, into tables of counts that begin anew
    assert (await shared.deletions(-math.inf)).users == []
    await shared.apply("other", [entry(5, None, "deletion", user="secret-user")])
    assert (await shared.deletions(-math.inf)).users == [("secret-user", NOW + 5)]


def impression(item: str, position: int, user: str = "u1", shown: float = 11) -> Impression:
    one = entry(1, True, user=user, item=item, position=position).interaction
    return Impression(one.impression_id, one.user_id, one.item_id, True, NOW + shown)


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose own counts reach to NOW + 10."""
    return tiny_bundle(tmp_path_factory.mktemp("newer") / "newer", rest_seed=3, counted_until=NOW + 10)


async def test_each_bundle_counts_what_was_shown_since_its_own_counts_and_fills_in_what_came_before_it(
    redis: RedisServer, shared: RedisInteractions, bundle: Bundle, newer: Bundle
) -> None:
    publish(redis, bundle)
    assert [one.since for one in await shared.unfilled("log")] == [bundle.manifest.counted_until]
    before = [
        entry(1, True),
        entry(11, False, item="i2", position=1),
        entry(12, None, item="i3", position=2),
        entry(20, None, position=0),  # shown at NOW + 1, so the newer bundle has it
        entry(21, False, item="i5", position=5),
    ]
    await shared.apply("log", before)
    publish(redis, newer)
    [table] = [one for one in await shared.unfilled("log") if one.since == NOW + 10]
    await shared.apply("log", [entry(30, True, item="i3", position=2)])  # its outcome: shown since, and not yet filled
    await shared.apply("other", [entry(31, True, item="i2", position=1)])  # and of what another server was told
    await shared.apply("log", [entry(32, True, item="i5", position=5), entry(33, False, item="i5", position=6)])
    told = [impression("i1", 0, shown=1), impression("i2", 1), impression("i3", 2), impression("i5", 5)]
    await shared.fill("log", table, told[:2], last=False)
    with pytest.raises(SharedStoreError, match="another part"):  # the answer was lost: a server asks where it stands
        await shared.fill("log", table, told[:2], last=False)
    [again] = [one for one in await shared.unfilled("log") if one.since == NOW + 10]
    assert (again.number, again.after) == (table.number, told[1].impression_id)
    for _ in range(2):
        await shared.fill("log", again, told[2:], last=True)
        await shared.fill("other", table, told[1:2], last=True)
    since = {"i2": Counts(1, 1), "i3": Counts(1, 1), "i5": Counts(2, 1)}
    items = ["i1", "i2", "i3", "i5", "i9"]
    assert await shared.counts(newer.id, ["u1"], items) == Counted(True, {"u1": Counts(4, 3)}, since)
    first = Counted(True, {"u1": Counts(5, 4)}, {"i1": Counts(1, 1), **since})
    assert await shared.counts(bundle.id, ["u1"], items) == first
    assert table not in await shared.unfilled("log") and table in await shared.unfilled("third")


async def test_an_impression_that_was_shown_earlier_than_was_told_first_leaves_the_counts_that_it_is_too_old_for(
    redis: RedisServer, shared: RedisInteractions, newer: Bundle
) -> None:
    publish(redis, newer)
    await shared.apply("log", [entry(11, True)])
    assert (await shared.counts(newer.id, ["u1"], ["i1"])).items == {"i1": Counts(1, 1)}
    await shared.apply("log", [entry(9, None)])
    assert (await shared.counts(newer.id, ["u1"], ["i1"])).items == {"i1": Counts(0, 0)}


async def test_a_deleted_users_counts_end_in_every_bundle_and_the_items_keep_theirs(
    redis: RedisServer, shared: RedisInteractions, bundle: Bundle, newer: Bundle
) -> None:
    publish(redis, bundle)
    await shared.apply("log", [entry(11, True), entry(12, True, user="u2", position=1), entry(20, None, "deletion")])
    left = Counted(True, {"u2": Counts(1, 1)}, {"i1": Counts(2, 2)})
    assert await shared.counts(bundle.id, ["u1", "u2"], ["i1"]) == left
    publish(redis, newer)
    [table] = await shared.unfilled("log")
    told = [impression("i1", 0), impression("i1", 1, "u2")]  # from a log that has not heard of the deletion yet
    await shared.fill("log", table, told, last=True)
    left = Counted(True, {"u2": Counts(1, 1)}, {"i1": Counts(1, 1)})
    assert await shared.counts(newer.id, ["u1", "u2"], ["i1"]) == left
    await shared.apply("log", [entry(30, True, item="i2", position=3)])
    for one in (bundle, newer):
        assert (await shared.counts(one.id, ["u1"], [])).users == {"u1": Counts(1, 1)}
    await shared.apply("log", [entry(50, None, "deletion")])
    for one in (bundle, newer):
        assert (await shared.counts(one.id, ["u1"], ["i2"])) == Counted(True, {}, {"i2": Counts(1, 1)})


async def test_a_bundle_published_once_more_after_its_end_counts_anew(
    redis: RedisServer, shared: RedisInteractions, bundle: Bundle, newer: Bundle
) -> None:
    publish(redis, bundle)
    await shared.apply("log", [entry(11, True)])
    [table] = await shared.unfilled("log")
    await shared.fill("log", table, [impression("i1", 0)], last=True)
    publish(redis, bundle, again=True)
    assert await shared.unfilled("log") == ()  # its table stays
    publish(redis, newer)
    publish(redis, bundle)
    [again] = [one for one in await shared.unfilled("log") if one.since == table.since]
    assert again.number != table.number and (await shared.counts(bundle.id, ["u1"], [])).users == {}
    await shared.fill("log", again, [impression("i1", 0)], last=True)
    assert (await shared.counts(bundle.id, ["u1"], [])).users == {"u1": Counts(1, 1)}
