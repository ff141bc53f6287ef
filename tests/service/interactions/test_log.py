"""The log on disk: what is acknowledged stays, what cannot be written is refused whole."""

import asyncio
import os
import shutil
import sqlite3
import threading
from contextlib import suppress
from pathlib import Path
from time import time as wall
from typing import Any

import pytest

from service.collaborators import Collaborators
from service.interactions.database import LogFileError, open_to_read
from service.interactions.ledger import Counts, Taken
from service.interactions.log import EventConflictError, EventLog, LogLimits, LogUnansweredError, LogUnavailableError
from tests.service.interactions.conftest import DAY_S, LIMITS, NOW, FakeTime, Open, event

pytestmark = pytest.mark.anyio


async def likes(log: EventLog, user_id: str = "u1") -> list[str]:
    live = await log.live([user_id])
    return [like.event_id for like in live[user_id].likes] if user_id in live else []


async def until_erased(log: EventLog) -> None:
    async with asyncio.timeout(20):
        while log._writer._remnants:
            await asyncio.sleep(0.01)


async def sweep_all(log: EventLog) -> None:
    await log.sweep()
    while log.behind:
        await log.sweep()


async def test_what_was_acknowledged_is_there_after_a_restart(log: EventLog, new_log: Open) -> None:
    await log.append([event("e1"), event("e2", timestamp=NOW - 1)])
    before = log.position()
    await log.close()
    again = new_log()
    await again.start()
    assert await likes(again) == ["e2", "e1"] and again.position() == before
    assert (await again.append([event("e1")])).verdicts == ("duplicate",)
    await again.close()


async def test_requests_that_come_together_share_commits(log: EventLog) -> None:
    connection = log._writer._connection
    assert connection is not None
    free, statements = threading.Event(), list[str]()
    held = log._writer.submit(lambda _: free.wait(20))
    while not held.running():
        await asyncio.sleep(0.001)
    connection.set_trace_callback(statements.append)
    together = [asyncio.create_task(log.append([event(f"e{number}", item_id=f"i{number}")])) for number in range(50)]
    await asyncio.sleep(0.01)
    free.set()
    await asyncio.gather(*together)
    assert statements.count("COMMIT") == 2  # of what held them up, and of all fifty
    await log.append([event("alone")])
    assert statements.count("COMMIT") == 3
    assert [entry.seq for entry in log.read(0, 100)] == list(range(1, 52))


async def test_a_write_that_nobody_waits_for_and_that_had_not_begun_is_never_made(
    log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.interactions.log.DISK_S", 0.1)
    free = threading.Event()
    held = log._writer.submit(lambda _: free.wait(20))
    while not held.running():
        await asyncio.sleep(0.001)
    with pytest.raises(LogUnavailableError) as refused:
        await log.append([event("e1")])
    assert not isinstance(refused.value, LogUnansweredError)
    free.set()
    held.result(20)
    assert (await log.append([event("e2")])).seq == 1


async def test_a_write_that_the_disk_has_not_answered_is_told_as_unknown_and_heard_of_later(
    log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.interactions.log.DISK_S", 0.2)
    first, second = threading.Event(), threading.Event()
    held = log._writer.submit(lambda _: first.wait(20))
    while not held.running():
        await asyncio.sleep(0.001)
    beside = log._writer.submit(lambda _: second.wait(20))
    late: list[Taken] = []
    asked = asyncio.create_task(log.append([event("e1")], late=late.append))
    await asyncio.sleep(0.01)
    first.set()
    with pytest.raises(LogUnansweredError):
        await asked
    second.set()
    beside.result(20)
    monkeypatch.setattr("service.interactions.log.DISK_S", 20)
    assert (await log.append([event("e1")])).verdicts == ("duplicate",)
    assert [one.verdicts for one in late] == [("accepted",)] and len(late[0].resolved) == 1


async def test_nothing_is_read_from_a_disk_that_does_not_answer_and_health_says_so(
    log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    await log.append([event("e1"), event("e2", user_id="u2")])
    await log.delete("u2")
    monkeypatch.setattr("service.interactions.log.DISK_S", 0.1)
    free = threading.Event()
    held = log._writer.submit(lambda _: free.wait(20))
    while log.health().ready:
        await asyncio.sleep(0.01)
    assert "has not answered" in log.health().detail

    def reading(*_: object) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr("service.interactions.ledger.Ledger.live", reading)
        assert {one: live.deleted_at for one, live in (await log.live(["u1", "u2"])).items()} == {"u2": NOW}
    free.set()
    held.result(20)
    while not log.health().ready:
        await asyncio.sleep(0.01)
    assert await likes(log) == ["e1"]


class FailsAfterCommit:
    """A connection whose disk reports an error for a commit that it has written."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, statement: str, *more: Any) -> sqlite3.Cursor:
        done = self._connection.execute(statement, *more)
        if statement == "COMMIT":
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
            raise error
        return done


async def test_a_commit_that_fails_is_told_as_unknown(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.interactions.writer.RETRY_S", 0.0)
    connection = log._writer._connection
    assert connection is not None
    log._writer._connection = FailsAfterCommit(connection)  # type: ignore[assignment]
    with pytest.raises(LogUnansweredError, match="disk I/O error"):
        await log.append([event("e1")])
    assert (await log.append([event("e1")])).verdicts == ("duplicate",)


@pytest.mark.parametrize("other", ["symlink", "hard link", "folder", "spelling"])
async def test_a_log_has_one_lock_under_all_its_names(
    log: EventLog, new_log: Open, path: Path, tmp_path: Path, other: str
) -> None:
    name = tmp_path / "other.sqlite"
    if other == "symlink":
        name.symlink_to(path)
    elif other == "hard link":
        name.hardlink_to(path)
    elif other == "folder":
        (tmp_path / "folder").symlink_to(tmp_path)
        name = tmp_path / "folder" / path.name
    else:
        name = tmp_path / "." / ".." / tmp_path.name / path.name
    second = new_log(name)
    await second.start()
    with pytest.raises(LogUnavailableError, match="another process writes this log"):
        await second.append([event("e2")])
    await second.close()
    assert (await log.append([event("e1")])).seq == 1


async def test_a_pipe_at_the_logs_path_is_refused_at_once(new_log: Open, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    log = new_log(tmp_path / "pipe")
    async with asyncio.timeout(10):
        await log.start()
        assert "no regular file" in log.health().detail
        await log.close()


async def test_a_conflict_takes_nothing_of_its_batch_and_nothing_from_its_neighbours(log: EventLog) -> None:
    await log.append([event("e1", timestamp=NOW)])
    outcomes = await asyncio.gather(
        log.append([event("a")]),
        log.append([event("b"), event("e1", timestamp=NOW + 1)]),
        log.append([event("c")]),
        return_exceptions=True,
    )
    assert isinstance(outcomes[1], EventConflictError) and outcomes[1].index == 1
    assert await likes(log) == ["a", "c", "e1"]


async def test_only_one_process_writes_a_log(log: EventLog, new_log: Open) -> None:
    second = new_log()
    await second.start()
    assert not second.health().ready and "another process" in second.health().detail
    with pytest.raises(LogUnavailableError, match="another process"):
        await second.append([event("e1")])
    assert await second.live(["u1"]) == {}
    await second.close()
    assert log.health().ready


async def test_a_log_that_comes_free_is_opened(log: EventLog, new_log: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.interactions.writer.RETRY_S", 0.0)
    second = new_log()
    await second.start()
    await log.close()
    await second.sweep()
    assert second.health().ready
    await second.close()


@pytest.mark.parametrize("damage", ["noise", "other", "middle"])
async def test_a_damaged_file_is_named_and_left_as_it_is(log: EventLog, new_log: Open, path: Path, damage: str) -> None:
    for number in range(40):
        await log.append([event(f"e{number}-{more}") for more in range(20)])
    await log.close()
    if damage == "noise":
        path.write_bytes(b"noise" * 5000)
    elif damage == "other":
        path.unlink()
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE something (x)")
        other.close()
    else:
        content = bytearray(path.read_bytes())
        content[8192:32768] = b"\x99" * 24576
        path.write_bytes(content)
    found = path.read_bytes()
    again = new_log()
    await again.start()
    assert not again.health().ready
    assert str(path) in again.health().detail and "\n" not in again.health().detail
    with pytest.raises(LogUnavailableError):
        await again.append([event("new")])
    await again.close()
    assert path.read_bytes() == found


async def test_a_full_disk_refuses_whole_batches_and_recovers(log: EventLog, path: Path) -> None:
    await log.append([event("before")])
    connection = log._writer._connection
    assert connection is not None
    [pages] = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    batch = [event(f"e{number}", item_id="x" * 200) for number in range(200)]
    with pytest.raises(LogUnavailableError, match="full"):
        await log.append(batch)
    assert not log.health().ready and await likes(log) == ["before"]
    connection.execute("PRAGMA max_page_count = 100000")
    assert (await log.append(batch)).verdicts == ("accepted",) * 200
    assert log.health().ready and log.read(0, 1000)[0].interaction.event_id == "before"


async def test_a_file_that_is_removed_takes_nothing_until_it_is_back(log: EventLog, path: Path) -> None:
    await log.append([event("before")])
    assert await likes(log) == ["before"]
    away = path.rename(path.with_name("away"))
    for _ in range(2):
        with pytest.raises(LogUnavailableError, match="removed or replaced"):
            await log.append([event("lost")])
        assert not log.health().ready and str(path) in log.health().detail
        assert await likes(log) == ["before"]
        path.touch()
    away.replace(path)
    assert (await log.append([event("after")])).verdicts == ("accepted",)
    assert log.health().ready and await likes(log) == ["after", "before"]


async def test_a_log_that_can_be_read_again_says_so_by_itself(log: EventLog, path: Path) -> None:
    away = path.rename(path.with_name("away"))
    assert await likes(log) == [] and not log.health().ready
    away.replace(path)
    await log.sweep()
    assert log.health().ready


async def test_a_folder_that_is_not_there_is_told(new_log: Open, tmp_path: Path) -> None:
    log = new_log(tmp_path / "missing" / "log.sqlite")
    await log.start()
    assert "missing" in log.health().detail
    await log.close()


async def test_an_impression_without_outcome_becomes_a_negative_in_time(log: EventLog, time: FakeTime) -> None:
    await log.append([event("shown", None), event("liked", None, item_id="i8")])
    time.passes(LIMITS.attribution_s - 1)
    assert await log.sweep() == ()
    await log.append([event("liked", True, item_id="i8")])
    time.passes(1)
    [expired] = await log.sweep()
    assert expired.interaction.event_id == "shown" and not expired.positive
    assert await log.sweep() == () and log.read(0, 9)[-1].kind == "expiry"
    assert log.counts("item", ["i7", "i8"]) == {"i7": Counts(1, 0), "i8": Counts(1, 1)}
    late = await log.append([event("shown", True)])
    assert late.verdicts == ("accepted",) and [one.positive for one in late.resolved] == [True]
    assert log.counts("user", ["u1"]) == {"u1": Counts(2, 2)}
    assert await likes(log) == ["liked", "shown"]


async def test_outcomes_find_their_impression_by_the_answer(log: EventLog, time: FakeTime) -> None:
    answer = {"request_id": "r1", "position": 3}
    taken = await log.append([event("click", True, NOW + 9, **answer), event("view", None, **answer)])
    assert [(one.interaction.event_id, one.positive) for one in taken.resolved] == [("click", True)]
    await log.append([event("again", True, NOW + 5, **answer), event("never", False, NOW + 7, **answer)])
    assert await likes(log) == ["again"]  # one impression, one like: its first
    assert log.counts("user", ["u1"]) == {"u1": Counts(1, 1)}
    time.passes(2 * LIMITS.attribution_s)
    assert await log.sweep() == ()


async def test_a_clock_that_is_set_neither_expires_early_nor_doubles(
    log: EventLog, new_log: Open, time: FakeTime
) -> None:
    await log.append([event("a", None)])
    time.wall -= 7200  # set back
    await log.append([event("b", None, item_id="i8")])
    time.wall += 3 * 7200  # and ahead
    assert await log.sweep() == ()
    time.wall -= 2 * 7200
    time.passes(LIMITS.attribution_s - 1)
    assert await log.sweep() == ()
    time.passes(1)
    assert len(await log.sweep()) == 2 and await log.sweep() == ()
    # A process that starts with a clock set back goes on from the log's last entry.
    await log.append([event("c", None, item_id="i9")])
    await log.close()
    time.wall -= 86_400
    again = new_log()
    await again.start()
    time.passes(LIMITS.attribution_s - 1)
    assert await again.sweep() == ()
    time.passes(1)
    assert len(await again.sweep()) == 1
    await again.close()


async def test_retention_is_not_bounded_by_the_number_of_its_rounds(
    recording: Collaborators, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 entries a second leave again; the rounds come each second."""
    monkeypatch.setattr("service.interactions.recorder.SWEEP_S", 0.2)
    log = recording.interactions._log
    log._limits = LogLimits(0.0, 0.5)
    now = wall()
    for number in range(8):
        await log.append([event(f"e{number}-{one}", timestamp=now - 10, item_id=f"i{one}") for one in range(500)])
    began = wall()
    while log.read(0, 1):
        assert wall() < began + 4.5
        await asyncio.sleep(0.05)


async def test_a_clock_set_ahead_does_not_empty_the_log(log: EventLog, time: FakeTime) -> None:
    await log.append([event("a")])
    time.wall += 1000 * DAY_S
    await log.sweep()
    assert await likes(log) == ["a"]


async def test_old_events_leave_and_counts_and_tombstones_stay(log: EventLog, time: FakeTime) -> None:
    await log.delete("gone")
    await log.append([event(f"e{number}", item_id=f"i{number}") for number in range(250)])
    await log.append([event("late", timestamp=NOW + DAY_S)])
    time.passes(LIMITS.retention_s + 10)
    await log.append([event("new")])
    await sweep_all(log)
    assert sorted(await likes(log)) == ["late", "new"]
    assert [entry.kind for entry in log.read(0, 9)] == ["deletion", "event", "event"]
    assert log.counts("user", ["u1"]) == {"u1": Counts(252, 252)}
    assert (await log.live(["gone"]))["gone"].deleted_at == NOW


async def test_a_deleted_user_leaves_no_bytes_and_cannot_come_back_by_retries(log: EventLog, path: Path) -> None:
    for number in range(30):
        batch = [
            event(f"{what}{number}-{more}", user_id=user_id, item_id=f"i{more}" * 5)
            for more in range(15)
            for what, user_id in (("secret", "victim"), ("public", "other"))
        ]
        await log.append([*batch, event(f"ahead{number}", user_id="victim", timestamp=NOW + 1000 + number)])
    deleted_at, seq = await log.delete("victim")
    assert deleted_at == NOW + 1029 and log.position().seq == seq
    await until_erased(log)
    content = b"".join(part.read_bytes() for part in path.parent.iterdir())
    assert b"secret" not in content and b"ahead" not in content and b"public0-0" in content
    assert content.count(b"victim") == 3  # the tombstone: its entry, the entry's index, the table of deletions
    assert log.counts("user", ["victim"]) == {} and log.counts("item", ["i7"]) == {"i7": Counts(30, 30)}
    taken = await log.append([event("ahead7", user_id="victim", timestamp=NOW + 1007)])
    assert taken.verdicts == ("forgotten",)
    after = await log.append([event("back", user_id="victim", timestamp=NOW + 1030)])
    assert after.verdicts == ("accepted",) and await likes(log, "victim") == ["back"]


async def test_who_was_deleted_stays_so_where_the_log_cannot_be_read_any_more(
    log: EventLog, new_log: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    await log.append([event("e1"), event("e2", user_id="u2")])
    await log.delete("u1")
    await log.take_deletions([("u2", NOW + 1)])
    await log.close()
    again = new_log()
    await again.start()
    await again.delete("u3")

    def damaged(*_: object) -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    monkeypatch.setattr("service.interactions.ledger.Ledger.live", damaged)
    found = await again.live([f"u{number}" for number in range(1, 50)])
    assert {one: live.deleted_at for one, live in found.items()} == {"u1": NOW, "u2": NOW + 1, "u3": NOW}
    assert not again.health().ready
    await again.close()


async def test_a_deletion_elsewhere_takes_what_came_before_it_from_a_clock_ahead(log: EventLog, time: FakeTime) -> None:
    await log.append([event("ahead", timestamp=NOW + 5000)])
    time.passes(10)
    assert await log.take_deletions([("u1", NOW + 5)]) == ("u1",)
    found = (await log.live(["u1"]))["u1"]
    assert (found.likes, found.deleted_at) == ((), NOW + 5000)
    time.passes(6000)
    await log.append([event("back", timestamp=NOW + 6010)])
    assert await log.take_deletions([("u1", NOW + 5)]) == ()
    assert await likes(log) == ["back"]


async def test_a_deletion_known_elsewhere_is_taken_once_and_spares_what_came_later(log: EventLog) -> None:
    await log.append([event("old", timestamp=NOW - 10), event("new", timestamp=NOW), event("open", None, NOW)])
    assert await log.take_deletions([("u1", NOW - 5)]) == ("u1",)
    assert await log.take_deletions([("u1", NOW - 5), ("u1", NOW - 7)]) == ()
    assert await likes(log) == ["new"] and log.counts("user", ["u1"]) == {"u1": Counts(1, 1)}
    assert [entry.kind for entry in log.read(0, 9)] == ["event", "event", "deletion"]


async def test_seqs_are_never_used_again(log: EventLog, new_log: Open) -> None:
    await log.append([event("e1"), event("e2")])
    await log.delete("u1")
    await log.close()
    again = new_log()
    await again.start()
    assert (await again.append([event("e3", user_id="u2")])).seq == 4
    await again.close()


async def test_a_reader_beside_the_writer_names_what_it_cannot_read(tmp_path: Path) -> None:
    for content in (None, b"", b"noise" * 999):
        path = tmp_path / "log.sqlite"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(LogFileError, match=r"log\.sqlite"):
            open_to_read(path)


async def test_closing_ends_a_task_that_loses_a_cancellation(recording: Collaborators) -> None:
    """`asyncio.wait_for` before Python 3.12 loses one that comes as its future ends."""

    async def loses_one() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        await asyncio.sleep(3600)

    task = asyncio.create_task(loses_one())
    recording.interactions._tasks.append(task)
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await recording.interactions.close()
    assert task.cancelled()


async def test_each_opening_with_entries_before_it_begins_an_epoch(log: EventLog, new_log: Open, path: Path) -> None:
    await log.append([event("e1"), event("e2")])
    first = log.position().epochs
    await log.close()
    backup = path.with_name("backup.sqlite")
    shutil.copy(path, backup)
    seen = [first]
    for _ in range(2):  # the second opening finds an epoch without entries, and takes its place
        again = new_log()
        await again.start()
        seen.append(again.position().epochs)
        await again.close()
    assert [len(one) for one in seen] == [1, 2, 2]
    assert seen[1][0] == seen[2][0] == first[0] and [one[1].start for one in seen[1:]] == [2, 2]
    other = new_log(backup)
    await other.start()
    await other.append([event("e3")])
    assert other.position().epochs[0] == first[0]
    assert len({one.id for epochs in (*seen, other.position().epochs) for one in epochs}) == 4
    await other.close()
