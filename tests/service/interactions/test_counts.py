"""Live counts equal a plain count of the log, whether filled, updated by changes, or both."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.fusion import Counts
from service.interactions.counts import NOTHING_COUNTED, Counted, LiveCounts
from service.interactions.event import Interaction
from service.interactions.ledger import Ledger
from service.interactions.log import EventLog
from tests.service.interactions.conftest import LIMITS, NOW, FakeTime, Open, event
from tests.service.interactions.test_ledger import ITEMS, USERS, arrivals, ledger

UNTIL = NOW + 1  # of the times NOW to NOW + 3 that `arrivals` draws


def plain(one: Ledger) -> tuple[dict[str, Counts], dict[str, Counts]]:
    """Count from the entries alone, in Python."""
    shown: dict[str, float] = {}
    known: dict[str, bool] = {}
    owners: dict[str, tuple[str, str]] = {}
    for entry in one.read(0, 10_000):
        told = entry.interaction
        if entry.kind == "deletion":
            continue
        name = told.impression_id
        owners[name] = told.user_id, told.item_id
        shown[name] = min(shown.get(name, told.timestamp), told.timestamp)
        if told.label is not None or entry.kind == "expiry":
            known[name] = known.get(name, False) or bool(told.label)
    users: dict[str, Counts] = {}
    items: dict[str, Counts] = {}
    for name, positive in known.items():
        if shown[name] > UNTIL:
            for table, owner in zip((users, items), owners[name], strict=True):
                table[owner] = table.get(owner, Counts()) + Counts(1, int(positive))
    return users, items


def told_by(counts: LiveCounts) -> tuple[dict[str, Counts], dict[str, Counts]]:
    """The counts, without ids whose counts are zero."""
    counted = counts.of(USERS, ITEMS)
    nothing = Counts()
    users, items = counted.users, counted.items
    return {a: b for a, b in users.items() if b != nothing}, {a: b for a, b in items.items() if b != nothing}


@given(arrivals(), st.integers(0, 8), st.integers(0, 8), st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_counts_filled_at_any_moment_and_kept_up_are_those_of_the_entries(
    both: tuple[list[Interaction], list[Interaction]], collected: int, read: int, late: bool
) -> None:
    _, order = both
    with ledger() as one:
        counts = LiveCounts(UNTIL)
        snapshot = None
        for place, told in enumerate(order):
            if place == min(collected, read, len(order) - 1):
                counts.collect()
            if place == min(read, len(order) - 1):
                snapshot = one.last_seq(), *one.counted_since(UNTIL)
                if not late:
                    counts.fill(*snapshot)
            one.changes.clear()
            one.take([told], NOW)
            counts.apply(one.changes)
        assert snapshot is not None
        counts.fill(*snapshot)
        one.changes.clear()
        one.expire(NOW + 60, 100)
        counts.apply(one.changes)
        assert told_by(counts) == plain(one) == one.counted_since(UNTIL)


@given(arrivals())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_a_deleted_user_counts_nothing_and_the_items_keep_what_they_have(
    both: tuple[list[Interaction], list[Interaction]],
) -> None:
    _, order = both
    with ledger() as one:
        counts = LiveCounts(UNTIL)
        counts.refill({}, {})
        one.take(order, NOW)
        counts.apply(one.changes)
        _, items = told_by(counts)
        one.changes.clear()
        one.delete("u1", NOW + 2, NOW)  # before some of what the user did
        counts.apply(one.changes)
        users, _ = plain(one)
        assert told_by(counts) == (users, items)


async def counted(log: EventLog, *events: Interaction) -> None:
    await log.append(events)


@pytest.mark.anyio
async def test_what_is_acknowledged_is_counted_and_what_is_refused_is_not(log: EventLog, time: FakeTime) -> None:
    counts = LiveCounts(NOW - 10)
    log.register(counts)
    assert counts.of(["u1"], ["i7"]) == NOTHING_COUNTED
    await log.fill_counts()
    await counted(log, event("before", timestamp=NOW - 10), event("liked"), event("shown", None))
    assert counts.of(["u1", "u2"], ["i7"]).users == {"u1": Counts(1, 1)}
    with pytest.raises(Exception, match="other content"):
        await counted(log, event("new"), event("liked", item_id="i8"))
    assert counts.of([], ["i7", "i8"]).items == {"i7": Counts(1, 1)}
    time.passes(LIMITS.attribution_s)
    await log.sweep()
    assert counts.of([], ["i7"]).items == {"i7": Counts(2, 1)}
    await counted(log, event("shown", True))
    assert counts.of([], ["i7"]).items == {"i7": Counts(2, 2)}
    await log.delete("u1")
    assert counts.of(["u1"], ["i7"]) == Counted(True, {}, {"i7": Counts(2, 2)})
    log.unregister(counts)
    await counted(log, event("later", timestamp=NOW + 9000, user_id="u3"))
    assert counts.of(["u3"], []).users == {}


@pytest.mark.anyio
async def test_counts_come_back_when_the_log_is_opened_again(log: EventLog, new_log: Open) -> None:
    await counted(log, event("liked"), event("not", False, user_id="u2"))
    await log.close()
    again, counts = new_log(), LiveCounts(NOW - 10)
    again.register(counts)
    await again.start()
    assert counts.of(["u1", "u2"], ["i7"]).users == {"u1": Counts(1, 1), "u2": Counts(1, 0)}
    await again.close()
