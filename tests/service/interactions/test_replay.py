"""The log's way into the shared store: everything, in order, whatever the store goes through."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import structlog
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from service.interactions.log import EventLog
from service.interactions.replay import Replay
from service.interactions.shared import CountTable, Impression
from service.metrics.interactions import InteractionMetrics
from tests.service.interactions.conftest import NOW, event
from tests.service.interactions.memory import SharedMemory

pytestmark = pytest.mark.anyio


@pytest.fixture
def shared() -> SharedMemory:
    return SharedMemory()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
async def replay(
    log: EventLog, shared: SharedMemory, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Replay]:
    for name in ("POLL_S", "DELETIONS_S", "AUDIT_S", "FIRST_RETRY_S", "LAST_RETRY_S"):
        monkeypatch.setattr(f"service.interactions.replay.{name}", 0.01)
    replay = Replay(log, shared, InteractionMetrics(registry), structlog.get_logger())
    task = asyncio.create_task(replay.run())
    yield replay
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.005)


async def test_what_is_acknowledged_is_shared_at_once(log: EventLog, replay: Replay, shared: SharedMemory) -> None:
    taken = await log.append([event("e1"), event("e2", None, item_id="i8")])
    assert await replay.caught_up(taken.seq, 20)
    assert shared.applied_seqs == [1, 2] and shared.counts["item", "i7"] == [1, 1]


async def test_a_store_that_was_down_gets_everything_once_and_in_order(
    log: EventLog, replay: Replay, shared: SharedMemory, registry: CollectorRegistry
) -> None:
    shared.down = True
    for number in range(30):
        await log.append([event(f"e{number}-{more}") for more in range(20)])
    await until(lambda: registry.get_sample_value("sella_replay_lag_entries") == 600)
    assert not await replay.caught_up(600, 0.01)
    shared.down = False
    await until(lambda: shared.markers == {log.position().log_id: 600})
    assert shared.applied_seqs == list(range(1, 601))
    await until(lambda: registry.get_sample_value("sella_replay_lag_entries") == 0)


async def test_a_store_that_lost_everything_is_filled_from_the_beginning(
    log: EventLog, replay: Replay, shared: SharedMemory
) -> None:
    await replay.caught_up((await log.append([event("e1"), event("e2", False, item_id="i8")])).seq, 20)
    before = (dict(shared.counts), dict(shared.likes))
    shared.lose_everything()
    await until(lambda: bool(shared.markers))  # without anything new in the log
    assert (shared.counts, shared.likes) == before


async def test_a_store_that_is_emptied_between_question_and_entries_is_filled_too(
    log: EventLog, replay: Replay, shared: SharedMemory
) -> None:
    await replay.caught_up((await log.append([event("e1")])).seq, 20)
    shared.loses_before_apply = True
    await log.append([event("e2", item_id="i8")])
    replay.wake()
    await until(lambda: shared.markers.get(log.position().log_id) == 2 and not shared.loses_before_apply)
    assert shared.applied_seqs == [1, 2]


async def test_answers_that_are_lost_double_nothing(log: EventLog, replay: Replay, shared: SharedMemory) -> None:
    shared.fails_after = 3
    for number in range(4):
        await replay.caught_up((await log.append([event(f"e{number}", item_id=f"i{number}")])).seq, 0.02)
    await until(lambda: shared.markers.get(log.position().log_id) == 4)
    assert shared.counts["user", "u1"] == [4, 4]


async def test_entries_of_a_log_that_the_store_knows_further_are_taken_for_those_of_a_backup(
    log: EventLog, shared: SharedMemory, replay: Replay
) -> None:
    """A log that an earlier version wrote, put back as it was: no epoch says that it is another one's beginning."""
    await replay.caught_up((await log.append([event("e1")])).seq, 20)
    shared.markers[log.position().log_id] = 1000
    await until(lambda: len(log.position().epochs) == 2)
    assert await replay.caught_up((await log.append([event("e2", item_id="i8")])).seq, 20)
    assert shared.applied_seqs == [1, 2]


async def test_likes_that_the_store_has_lost_are_noticed_and_put_back(
    log: EventLog, shared: SharedMemory, replay: Replay, registry: CollectorRegistry
) -> None:
    await replay.caught_up((await log.append([event("e1"), event("e2", user_id="u2")])).seq, 20)
    before = dict(shared.likes)
    with capture_logs() as told:
        del shared.likes["u2"]
        await until(lambda: shared.likes == before)
        assert registry.get_sample_value("sella_replay_lost_total") == 1
        del shared.likes["u1"]  # a store that goes on losing them is not filled without end
        await until(lambda: (registry.get_sample_value("sella_replay_lost_total") or 0) > 3)
    assert shared.applied_seqs == [1, 2, 1, 2] and "u1" not in shared.likes
    assert [one["fills_again"] for one in told if one["event"] == "replay_lost"][:2] == [True, False]


async def test_deletions_go_both_ways(log: EventLog, replay: Replay, shared: SharedMemory) -> None:
    await log.append([event("e1"), event("e2", user_id="u2")])
    _, seq = await log.delete("u1")
    assert await replay.caught_up(seq, 20)
    await until(lambda: "u1" in shared.deleted)
    assert "u1" not in shared.likes
    shared.delete("u2", NOW + 5)
    await until(lambda: log.read(seq, 9) != [])
    assert (await log.live(["u2"]))["u2"].likes == ()
    assert (await log.append([event("e3", user_id="u2")])).verdicts == ("forgotten",)


async def test_a_slow_store_delays_an_acknowledgement_only_briefly(
    log: EventLog, replay: Replay, shared: SharedMemory
) -> None:
    shared.delay_s = 5.0
    taken = await log.append([event("e1")])
    assert not await replay.caught_up(taken.seq, 0.02)


async def test_a_new_table_of_counts_gets_each_impression_of_the_log_whose_outcome_is_known(
    log: EventLog, replay: Replay, shared: SharedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.interactions.replay.TABLES_S", 0.01)
    events = [event(f"e{number:04}", number % 3 > 0 or None, timestamp=NOW + number % 2) for number in range(1500)]
    taken = await log.append(events)
    assert await replay.caught_up(taken.seq, 20)
    shared.tables = [CountTable("1", NOW), CountTable("2", NOW + 1)]
    await until(lambda: len(shared.filled) == 2)
    expected = [one.impression_id for one in events if one.label is not None and one.timestamp > NOW]
    assert [one.impression_id for one in shared.told["1"]] == expected and len(expected) > 450
    assert shared.told["2"] == []
    assert shared.told["1"][0] == Impression("e0001\x1fu1", "u1", "i7", True, NOW + 1)
