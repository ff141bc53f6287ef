"""What a deletion leaves in the files: nothing, and no write waits for it long."""

import asyncio
import random
import sqlite3
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.interactions.database import FileLock, open_database
from service.interactions.erasure import Erasure
from service.interactions.event import Interaction
from service.interactions.ledger import Ledger
from service.interactions.log import EventLog
from tests.service.interactions.conftest import NOW, Open, event

pytestmark = pytest.mark.anyio

PAGE = 4096


def left(path: Path) -> tuple[int, int]:
    """How often the events of the deleted user stand in the files, and how often the user's id in the log itself.

    The tombstone is there three times: its entry, the entry's index, the table of deletions. Each commit that changes
    a page of these writes it to the write-ahead file once more.
    """
    return sum(part.read_bytes().count(b"secret") for part in path.parent.iterdir()), path.read_bytes().count(b"victim")


ERASED = (0, 3)


def batches(number: int) -> Iterator[list[Interaction]]:
    """Events of many users, in an order that moves rows between pages again and again."""
    rng = random.Random(0)
    for batch in range(number):
        yield [
            event(
                f"{'secret' if user == 'victim' else 'e'}{rng.getrandbits(64):016x}-{batch}-{one}",
                rng.choice([None, False, True]),
                NOW + rng.random() * 1000,
                user_id=user,
                item_id=f"i{rng.randrange(50)}",
                **({} if rng.random() < 0.5 else {"request_id": f"{rng.getrandbits(64):016x}", "position": one}),
            )
            for one in range(60)
            for user in ("victim", f"other{rng.randrange(40)}")
        ]


async def fill(log: EventLog, number: int) -> None:
    for batch in batches(number):
        await log.append(batch)


async def until_erased(log: EventLog, path: Path, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while left(path) != ERASED:
        assert time.monotonic() < end, left(path)
        await asyncio.sleep(0.05)


async def test_nothing_of_a_deleted_user_is_left_although_writing_goes_on(log: EventLog, path: Path) -> None:
    await fill(log, 25)
    writing = asyncio.create_task(fill_others(log))
    await log.delete("victim")
    await until_erased(log, path)
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    for seed in range(5):
        await log.append([event(f"again{seed}-{one}", user_id=f"other{one % 40}") for one in range(100)])
        assert left(path)[0] == 0
    await log.close()
    assert left(path) == ERASED
    with sqlite3.connect(path) as after:
        assert after.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    after.close()


async def fill_others(log: EventLog) -> None:
    for number in range(10_000):
        await log.append([event(f"o{number}-{one}", user_id=f"other{one}") for one in range(20)])
        await asyncio.sleep(0.002)


async def test_the_rest_is_erased_after_a_restart(log: EventLog, new_log: Open, path: Path) -> None:
    await fill(log, 10)
    await log.delete("victim")
    await log.close()  # at once
    again = new_log()
    await again.start()
    await until_erased(again, path)
    await again.close()


async def test_a_reader_beside_the_writer_postpones_the_erasure_and_writes_go_on(log: EventLog, path: Path) -> None:
    await fill(log, 10)
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    before = reader.execute("SELECT count(*) FROM entries WHERE user_id = 'victim'").fetchone()
    await log.delete("victim")
    started = time.monotonic()
    for number in range(20):
        await log.append([event(f"n{number}", user_id="other1")])
    assert time.monotonic() - started < 2  # SQLite alone would wait five seconds for the reader, each time
    assert reader.execute("SELECT count(*) FROM entries WHERE user_id = 'victim'").fetchone() == before
    reader.close()
    await until_erased(log, path)


async def test_the_bytes_between_a_pages_index_and_its_rows_are_what_sqlite_leaves(tmp_path: Path) -> None:
    """Without an erasure they hold deleted rows: the test of the others."""
    path = tmp_path / "log.sqlite"
    lock = FileLock(path)
    connection = open_database(path)
    ledger = Ledger(connection, 60.0)
    for batch in batches(25):
        connection.execute("BEGIN")
        ledger.take(batch, NOW)
        connection.execute("COMMIT")
    connection.execute("BEGIN")
    ledger.delete("victim", NOW + 1000, NOW)
    connection.execute("COMMIT")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert left(path)[1] > 3
    content = (
        connection.execute("SELECT * FROM entries").fetchall(),
        connection.execute("SELECT * FROM likes").fetchall(),
    )
    erasure = Erasure(connection, lock.descriptor)
    erasure.begin()
    for _ in range(1000):
        if erasure.step():
            break
    assert left(path) == ERASED
    assert content == (
        connection.execute("SELECT * FROM entries").fetchall(),
        connection.execute("SELECT * FROM likes").fetchall(),
    )
    connection.close()
    lock.release()
    for place in range(0, path.stat().st_size, PAGE):
        page = path.read_bytes()[place : place + PAGE]
        kind, _, cells, rows = struct.unpack_from(">BHHH", page, 100 if place == 0 else 0)
        if kind in (2, 5, 10, 13):
            head = (100 if place == 0 else 0) + (12 if kind < 10 else 8) + 2 * cells
            assert not page[head : rows or 65_536].strip(b"\0")
