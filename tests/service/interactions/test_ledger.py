"""The log's rules, whatever the order of arrival; test_scripts.py has those of the store that servers share."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from models.features import MAX_OUTCOMES
from service.interactions.database import open_database
from service.interactions.event import Interaction
from service.interactions.ledger import Counts, EventConflictError, Ledger
from service.interactions.live import MAX_LIKES, KnownOutcome, Like, impression_name
from tests.service.interactions.conftest import NOW, event

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


def test_the_newest_likes_are_kept() -> None:
    with ledger() as one:
        order = [*range(0, 2 * MAX_LIKES, 2), *range(1, 2 * MAX_LIKES, 2)]
        one.take([event(f"e{place:03}", timestamp=NOW + place) for place in order], NOW)
        likes = one.live(["u1"])["u1"].likes
        assert likes == tuple(Like(NOW + place, f"e{place:03}", "i7") for place in range(MAX_LIKES, 2 * MAX_LIKES))


def test_the_newest_outcomes_are_those_of_the_impressions_shown_last() -> None:
    with ledger() as one:
        order = [*range(0, 2 * MAX_OUTCOMES, 2), *range(1, 2 * MAX_OUTCOMES, 2)]
        one.take([event(f"e{place:03}", place % 3 == 0, NOW + place) for place in order], NOW)
        one.take([event("pending", None, NOW + 999), event("other", True, NOW + 999, user_id="u2")], NOW)
        outcomes = one.live(["u1"])["u1"].outcomes
        kept = range(MAX_OUTCOMES, 2 * MAX_OUTCOMES)
        names = {place: impression_name(event(f"e{place:03}").impression_id) for place in kept}
        assert outcomes == tuple(KnownOutcome(NOW + place, names[place], "i7", place % 3 == 0) for place in kept)


def test_a_negative_that_becomes_a_positive_is_one_outcome_and_a_deletion_removes_those_before_it() -> None:
    with ledger() as one:
        shown = {"request_id": "r", "position": 1}
        one.take([event("e1", False, **shown), event("e2", True, NOW + 5, **shown), event("e3", None, NOW + 1)], NOW)
        [outcome] = one.live(["u1"])["u1"].outcomes
        assert (outcome.shown, outcome.positive) == (NOW, True)
        one.expire(NOW + 60, 10)
        assert [each.positive for each in one.live(["u1"])["u1"].outcomes] == [True, False]
        one.delete("u1", NOW + 3, NOW + 70)
        [left] = one.live(["u1"])["u1"].outcomes
        assert (left.shown, left.positive) == (NOW + 5, True)


def test_outcomes_are_found_by_an_index_that_an_earlier_log_gets_when_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "log.sqlite"
    earlier = open_database(path)
    earlier.execute("DROP INDEX impressions_known")
    earlier.execute("CREATE INDEX impressions_user ON impressions (user_id)")
    earlier.close()
    connection = open_database(path)
    statements: list[str] = []
    connection.set_trace_callback(statements.append)
    Ledger(connection, 60.0).live(["u1"])
    [query] = [one for one in statements if "FROM impressions" in one]
    plan = str(connection.execute(f"EXPLAIN QUERY PLAN {query}").fetchall())
    connection.close()
    assert plan.count("impressions_known") == 2 and "TEMP" not in plan


def test_impressions_without_an_outcome_do_not_slow_down_reading_a_users_outcomes() -> None:
    with ledger() as one:
        one.take([event(f"e{place}", place % 2 == 0, NOW + place) for place in range(4)], NOW)
        one._db.execute("BEGIN")
        one.take([event(f"p{place}", None, NOW + 10 + place) for place in range(5_000)], NOW)
        one._db.execute("COMMIT")
        steps: list[int] = []
        one._db.set_progress_handler(lambda: steps.append(1), 100)  # called every 100 instructions of SQLite
        assert len(one.live(["u1"])["u1"].outcomes) == 4
        assert len(steps) < 10


def test_an_event_id_has_one_content() -> None:
    first = event("e", None, request_id="r", position=1)
    with ledger() as one:
        one.take([first], NOW)
        for change in (
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


def test_an_event_id_is_a_users_own() -> None:
    """Two clients that number their events from 1 do not know of each other."""
    with ledger() as one:
        events = [event("1", None), event("1", True, user_id="u2"), event("1", False, user_id="u3", item_id="i8")]
        assert one.take(events, NOW).verdicts == ("accepted",) * 3
        assert one.take(events, NOW).verdicts == ("duplicate",) * 3
        assert len({each.impression_id for each in events}) == 3
        assert one.take([event("1", True)], NOW).verdicts == ("accepted",)
        assert one.counts("user", ["u1", "u2", "u3"]) == {"u1": Counts(1, 1), "u2": Counts(1, 1), "u3": Counts(1, 0)}
        assert one.counts("item", ["i7"]) == {"i7": Counts(2, 2)}
        one.delete("u2", NOW, NOW)
        assert one.live(["u1"])["u1"].likes and one.counts("user", ["u1"]) == {"u1": Counts(1, 1)}


def test_a_request_id_that_is_used_again_names_another_impression() -> None:
    """A client whose request ids are all the same shows the same item at the same place day after day."""
    with ledger() as one:
        place, day = {"request_id": "always", "position": 1}, 86_400
        for number in range(3):
            one.take([event(f"shown{number}", None, NOW + number * day, **place)], NOW + number * day)
            assert len(one.expire(NOW + number * day + 60, 10)) == 1
        one.take([event("click1", True, NOW + day + 5, **place)], NOW + 3 * day)
        one.take([event("click2", True, NOW + day + 6, **place)], NOW + 3 * day)
        assert one.counts("user", ["u1"]) == {"u1": Counts(3, 1)}
        outcomes = one.live(["u1"])["u1"].outcomes
        assert [(each.shown - NOW, each.positive) for each in outcomes] == [(0, False), (day, True), (2 * day, False)]
        assert [each.event_id for each in one.live(["u1"])["u1"].likes] == ["click1"]
        shown = {entry.interaction.impression_id for entry in one.read(0, 99)}
        assert len(shown) == 3
        # Told twice within the time that an outcome is waited for, it is one.
        one.take([event("shown3", None, NOW + 2 * day + 30, **place)], NOW + 4 * day)
        assert {entry.interaction.impression_id for entry in one.read(0, 99)} == shown


def test_a_log_of_the_version_before_is_read_goes_on_and_keeps_its_impressions(tmp_path: Path) -> None:
    path = tmp_path / "log.sqlite"
    connection = open_database(path)
    for statement in (
        "DROP INDEX entries_event_user",
        "ALTER TABLE entries DROP COLUMN impression",
        "CREATE INDEX entries_event ON entries (event_id) WHERE kind = 'event'",
    ):
        connection.execute(statement)
    before = "INSERT INTO entries (kind, event_id, user_id, item_id, label, timestamp, received) VALUES"
    connection.execute(f"{before} ('event', 'e1', 'u1', 'i7', NULL, {NOW}, {NOW})")
    connection.execute(f"INSERT INTO impressions VALUES ('e1', 'u1', 'i7', 0, {NOW}, {NOW + 60}, 1, 1, NULL, NULL)")
    connection.close()
    connection = open_database(path)
    one = Ledger(connection, 60.0)
    assert one.take([event("e1", None)], NOW).verdicts == ("duplicate",)
    assert one.take([event("e1", True), event("e2", None)], NOW).verdicts == ("accepted",) * 2
    assert one.counts("user", ["u1"]) == {"u1": Counts(1, 1)}
    [outcome] = one.live(["u1"])["u1"].outcomes
    assert outcome.impression == impression_name("e1") and outcome.positive  # as Redis knows it
    assert [entry.interaction.impression_id for entry in one.read(0, 9)] == ["e1", "e1", "e2\x1fu1"]
    connection.execute(f"{before} ('event', 'e3', 'u1', 'i7', NULL, {NOW}, {NOW})")  # by that version, gone back to
    assert one.read(3, 9)[0].interaction.impression_id == "e3"
    connection.close()


def test_looking_for_what_is_old_does_not_read_the_whole_log() -> None:
    with ledger() as one:
        plan = one._db.execute(
            "EXPLAIN QUERY PLAN SELECT seq FROM entries WHERE kind != 'deletion' AND received < 1 AND timestamp < 1"
            " ORDER BY received, seq LIMIT 5"
        ).fetchall()
        assert isinstance(one._db, sqlite3.Connection) and "entries_received" in str(plan) and "TEMP" not in str(plan)
