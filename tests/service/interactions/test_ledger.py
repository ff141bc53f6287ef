"""The log's rules, whatever the order of arrival; and the same rules in the store that servers share."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from service.interactions.database import open_database
from service.interactions.event import Interaction
from service.interactions.ledger import Counts, EventConflictError, Ledger
from service.interactions.live import MAX_LIKES, Like
from tests.service.interactions.conftest import NOW, event
from tests.service.interactions.memory import SharedMemory

USERS, ITEMS = ("u1", "u2"), ("i1", "i2")


@contextmanager
def ledger() -> Iterator[Ledger]:
    with TemporaryDirectory() as folder:
        connection = open_database(Path(folder) / "log.sqlite")
        connection.execute("PRAGMA synchronous = OFF")
        try:
            yield Ledger(connection, 60.0)
        finally:
            connection.close()


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[list[Interaction], list[Interaction]]:
    """Events, and the same events in another order, some of them twice."""
    events = [
        Interaction(
            event_id=f"e{number}",
            user_id=draw(st.sampled_from(USERS)),
            item_id=draw(st.sampled_from(ITEMS)),
            label=draw(st.sampled_from([None, False, True])),
            timestamp=NOW + draw(st.integers(0, 3)),
            request_id=draw(st.sampled_from([None, "r"])),
            position=draw(st.sampled_from([None, 1])),
        )
        for number in range(draw(st.integers(1, 8)))
    ]
    again = draw(st.lists(st.sampled_from(events), max_size=4))
    return events, draw(st.permutations(events + again))


def state(one: Ledger) -> tuple[object, ...]:
    return one.live(USERS), one.counts("user", USERS), one.counts("item", ITEMS)


@given(arrivals())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_order_of_arrival_gives_the_same_likes_and_counts(
    both: tuple[list[Interaction], list[Interaction]],
) -> None:
    events, other = both
    with ledger() as first, ledger() as second:
        first.take(events, NOW)
        verdicts = [second.take([one], NOW).verdicts[0] for one in other]
        assert state(first) == state(second)
        assert verdicts.count("accepted") == len(events)


@given(arrivals())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_counts_are_those_of_a_plain_reading_of_the_events(
    both: tuple[list[Interaction], list[Interaction]],
) -> None:
    events, _ = both
    with ledger() as one:
        resolved = one.take(events, NOW).resolved
        told = {each.interaction.impression_id: each.positive for each in resolved}  # the last of each
        liked = {each.impression_id for each in events if each.label}
        assert told == {each.impression_id: each.impression_id in liked for each in events if each.label is not None}
        assert len(resolved) <= len(told) + len(liked)
        assert len(one.expire(NOW + 60, 100)) == len(resolved_not(events))
        for user_id in USERS:
            mine = {each.impression_id for each in events if each.user_id == user_id}
            liked = {each.impression_id for each in events if each.user_id == user_id and each.label}
            assert one.counts("user", [user_id]) == ({user_id: Counts(len(mine), len(liked))} if mine else {})


def resolved_not(events: list[Interaction]) -> list[Interaction]:
    """One event of each impression that has no outcome."""
    known = {one.impression_id for one in events if one.label is not None}
    return list({one.impression_id: one for one in events if one.impression_id not in known}.values())


@given(arrivals())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_shared_store_counts_the_same_from_the_entries(
    both: tuple[list[Interaction], list[Interaction]],
) -> None:
    shared = SharedMemory()
    with ledger() as one:
        one.take(both[1], NOW)
        one.expire(NOW + 60, 3)
        for entry in one.read(0, 1000):
            shared._apply(entry)
        for of, ids in (("user", USERS), ("item", ITEMS)):
            counted = {each: Counts(*shared.counts[of, each]) for each in ids if any(shared.counts.get((of, each), ()))}
            assert counted == one.counts(of, ids)  # type: ignore[arg-type]


def test_the_newest_likes_are_kept() -> None:
    with ledger() as one:
        order = [*range(0, 2 * MAX_LIKES, 2), *range(1, 2 * MAX_LIKES, 2)]
        one.take([event(f"e{place:03}", timestamp=NOW + place) for place in order], NOW)
        likes = one.live(["u1"])["u1"].likes
        assert likes == tuple(Like(NOW + place, f"e{place:03}", "i7") for place in range(MAX_LIKES, 2 * MAX_LIKES))


def test_an_event_id_has_one_content() -> None:
    first = event("e", None, request_id="r", position=1)
    with ledger() as one:
        one.take([first], NOW)
        for change in (
            {"user_id": "u2"},
            {"item_id": "i8"},
            {"timestamp": NOW + 1},
            {"request_id": "q"},
            {"position": 2},
            {"request_id": None},
        ):
            other = event("e", **{"label": None, "request_id": "r", "position": 1, **change})  # type: ignore[arg-type]
            try:
                one.take([event("x"), other], NOW)
            except EventConflictError as error:
                assert error.index == 1
            else:
                raise AssertionError(change)
        with_label = event("e", True, request_id="r", position=1)
        assert one.take([with_label], NOW).verdicts == ("accepted",)
        assert one.take([with_label, first], NOW).verdicts == ("duplicate", "duplicate")


def test_looking_for_what_is_old_does_not_read_the_whole_log() -> None:
    with ledger() as one:
        plan = one._db.execute(
            "EXPLAIN QUERY PLAN SELECT seq FROM entries WHERE kind != 'deletion' AND received < 1 AND timestamp < 1"
            " ORDER BY received, seq LIMIT 5"
        ).fetchall()
        assert isinstance(one._db, sqlite3.Connection) and "entries_received" in str(plan) and "TEMP" not in str(plan)
