"""The log as a data folder, read by the one who trains on it."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from models.features import UserFeatures
from service.cli import app
from service.interactions.database import open_database
from service.interactions.export import Exported, export_logs
from service.interactions.histories import merged
from service.interactions.log import EventLog
from tests.service.interactions.conftest import LIMITS, NOW, FakeTime, Open, event
from training.data.dataset import load_dataset
from training.data.errors import DataError
from training.data.history import build_histories
from training.data.split import SplitRule

pytestmark = pytest.mark.anyio


async def test_known_outcomes_are_exported_once_and_deleted_users_beside(
    log: EventLog, path: Path, tmp_path: Path, time: FakeTime
) -> None:
    answer = {"request_id": "r1", "position": 2, "item_id": "i3"}
    await log.append([event("a", None), event("b", None, item_id="i8"), event("v", None, NOW + 1, **answer)])
    await log.append([event("c", True, NOW + 5.5, **answer), event("n", False, NOW + 2, item_id="i9")])
    await log.append([event("x", user_id="gone"), event("a", True)])
    await log.delete("gone")
    time.passes(LIMITS.attribution_s)
    assert len(await log.sweep()) == 1
    await log.append([event("pending", None, item_id="i1")])
    out = tmp_path / "data"
    result = CliRunner().invoke(app, ["export", "--interactions", str(path), "--out", str(out)])
    assert result.exit_code == 0 and "4 interactions with a known outcome, 1 deleted users" in result.output
    assert pl.read_parquet(out / "interactions.parquet").rows() == [
        ("u1", "i7", 1, NOW),
        ("u1", "i8", 0, NOW),
        ("u1", "i9", 0, NOW + 2),
        ("u1", "i3", 1, NOW + 5.5),
    ]
    assert pl.read_parquet(out / "deleted_users.parquet").rows() == [("gone", NOW)]


async def test_a_bundle_trained_on_an_export_doubles_no_like(log: EventLog, path: Path, tmp_path: Path) -> None:
    await log.append([event(f"e{number}", item_id=f"i{number}", timestamp=NOW + number / 3) for number in range(5)])
    await log.append([event("tie", item_id="i2", timestamp=NOW), event("tie2", item_id="i1", timestamp=NOW)])
    export_logs([path], tmp_path)
    rows = pl.read_parquet(tmp_path / "interactions.parquet")
    stored = UserFeatures("u1", None, tuple(rows["item_id"]), tuple(rows["timestamp"]), rows.height)
    (tmp_path / "items.csv").write_text("item_id,title\n" + "".join(f"i{number},T{number}\n" for number in range(8)))
    histories = build_histories(load_dataset(tmp_path, split=SplitRule.parse("0.7,0.3"), require=()))
    assert histories.times_of(0).tolist() == list(stored.history_times)
    live = (await log.live(["u1"]))["u1"]
    assert stored.history == tuple(like.item_id for like in live.likes)
    both = merged("u1", stored, live)
    assert both.features == stored and both.likes == 0


async def test_a_second_export_leaves_nothing_of_who_was_deleted_since(
    log: EventLog, path: Path, tmp_path: Path
) -> None:
    await log.append([event("a", user_id="only")])
    assert export_logs([path], tmp_path / "data") == Exported(1, 0)
    await log.delete("only")
    assert export_logs([path], tmp_path / "data") == Exported(0, 1)
    assert not (tmp_path / "data" / "interactions.parquet").exists()


async def test_a_log_that_is_damaged_in_its_middle_is_one_line(log: EventLog, path: Path, tmp_path: Path) -> None:
    for number in range(40):
        await log.append([event(f"e{number}-{more}") for more in range(20)])
    await log.close()
    content = bytearray(path.read_bytes())
    content[8192:] = b"\x99" * (len(content) - 8192)
    path.write_bytes(content)
    result = CliRunner().invoke(app, ["export", "--interactions", str(path), "--out", str(tmp_path / "data")])
    assert result.exit_code == 2 and str(path) in result.output and "Traceback" not in result.output


async def test_a_log_that_nobody_writes_is_exported_too(log: EventLog, path: Path, tmp_path: Path) -> None:
    await log.append([event("a")])
    await log.close()
    assert [one.name for one in sorted(tmp_path.iterdir())] == [path.name, path.name + ".lock"]
    assert export_logs([path], tmp_path / "out") == Exported(1, 0)
    assert not (tmp_path / "out" / "deleted_users.parquet").exists()


def test_what_is_no_log_is_one_clear_line(tmp_path: Path) -> None:
    for argument in (tmp_path / "missing.sqlite", tmp_path):
        result = CliRunner().invoke(app, ["export", "--interactions", str(argument), "--out", str(tmp_path / "out")])
        assert result.exit_code == 2 and str(argument) in result.output and not (tmp_path / "out").exists()


async def two(new_log: Open, tmp_path: Path) -> tuple[EventLog, EventLog]:
    """The logs of two servers of one fleet."""
    logs = new_log(tmp_path / "a.sqlite"), new_log(tmp_path / "b.sqlite")
    for one in logs:
        await one.start()
    return logs


def rows(out: Path, name: str = "interactions") -> list[tuple[object, ...]]:
    return pl.read_parquet(out / f"{name}.parquet").rows()


async def test_an_impression_that_two_servers_know_is_one_row(new_log: Open, tmp_path: Path, time: FakeTime) -> None:
    a, b = await two(new_log, tmp_path)
    answer = {"request_id": "r1", "position": 1}
    await a.append([event("shown", None, **answer), event("alone", None, item_id="i8")])
    await a.append([event("both", None, item_id="i9")])
    await b.append([event("click", True, NOW + 5, **answer), event("again", True, NOW + 3, **answer)])
    await b.append([event("both", True, item_id="i9"), event("open", None, item_id="i1")])
    await a.append([event("later", True, NOW + 9, **answer)])
    time.passes(LIMITS.attribution_s)
    while a.behind or await a.sweep():
        pass
    for paths in (("a", "b"), ("b", "a"), ("b", "a", "a")):
        out = tmp_path / "-".join(paths)
        words = [word for one in paths for word in ("--interactions", str(tmp_path / f"{one}.sqlite"))]
        result = CliRunner().invoke(app, ["export", *words, "--out", str(out)])
        assert result.exit_code == 0 and "3 interactions with a known outcome, 0 deleted" in result.output
        assert rows(out) == [("u1", "i8", 0, NOW), ("u1", "i9", 1, NOW), ("u1", "i7", 1, NOW + 3)]
        assert [one.name for one in out.iterdir()] == ["interactions.parquet"]
    for one in (a, b):
        await one.close()


async def test_a_deletion_that_one_server_knows_holds_for_the_fleet(new_log: Open, tmp_path: Path) -> None:
    a, b = await two(new_log, tmp_path)
    await a.append([event("a1", timestamp=NOW - 5)])
    await b.append([event("b1", timestamp=NOW - 9), event("b2", timestamp=NOW + 60), event("b3", user_id="u2")])
    await a.delete("u1")
    logs = [tmp_path / "a.sqlite", tmp_path / "b.sqlite"]
    assert export_logs(logs, tmp_path / "out") == Exported(2, 1)
    assert rows(tmp_path / "out") == [("u2", "i7", 1, NOW), ("u1", "i7", 1, NOW + 60)]
    assert rows(tmp_path / "out", "deleted_users") == [("u1", NOW)]
    for one in (a, b):
        await one.close()


async def test_two_clients_event_ids_are_told_apart_and_those_of_an_earlier_version_are_found(
    new_log: Open, tmp_path: Path
) -> None:
    a, b = await two(new_log, tmp_path)
    await a.append([event("1", False), event("2", False, item_id="i8")])
    await b.append([event("1", True, user_id="u2"), event("2", True, NOW + 1, item_id="i8")])
    await a.close()
    with sqlite3.connect(tmp_path / "a.sqlite") as earlier:  # as that version has written it
        earlier.execute("UPDATE impressions SET impression_id = substr(impression_id, 1, 1)")
    earlier.close()
    export_logs([tmp_path / "a.sqlite", tmp_path / "b.sqlite"], tmp_path / "out")
    assert sorted(rows(tmp_path / "out")) == [  # type: ignore[type-var]
        ("u1", "i7", 0, NOW),
        ("u1", "i8", 1, NOW + 1),
        ("u2", "i7", 1, NOW),
    ]
    await b.close()


@pytest.mark.parametrize("form", ["csv", "parquet"])
async def test_items_that_are_missing_are_listed_and_training_goes_on_once_they_are_there(
    log: EventLog, path: Path, tmp_path: Path, form: str
) -> None:
    out, items = tmp_path / "data", tmp_path / "data" / f"items.{form}"
    out.mkdir()

    def write(*names: str) -> None:
        table = pl.DataFrame({"item_id": names, "title": [f"T {name}" for name in names]})
        table.write_csv(items) if form == "csv" else table.write_parquet(items)

    write("i1", "never")
    await log.append([event(f"e{one}", item_id=f"i{one % 3 + 1}", timestamp=NOW + one) for one in range(8)])
    words = ["export", "--interactions", str(path), "--out", str(out), "--items", str(items)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and "2 items that" in result.output
    assert (out / "missing_items.csv").read_text().splitlines() == ["item_id,rows", "i2,3", "i3,2"]
    with pytest.raises(DataError, match="; 2 items are missing"):
        load_dataset(out, split=SplitRule.parse("0.7,0.3"), require=())
    write("i1", "i2", "i3", "never")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and not (out / "missing_items.csv").exists()
    load_dataset(out, split=SplitRule.parse("0.7,0.3"), require=())
    result = CliRunner().invoke(app, [*words[:-1], str(tmp_path / "gone.csv")])
    assert result.exit_code == 2 and "gone.csv" in result.output


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    """Twice the log takes twice the time, and hardly more memory."""
    peaks = [export_in_a_process(tmp_path / f"{rows}.sqlite", rows) for rows in (50_000, 300_000)]
    assert peaks[1] - peaks[0] < 60, peaks


def export_in_a_process(path: Path, number: int) -> float:
    """Export a log of so many impressions; return the megabytes that the process had at most."""
    connection = open_database(path)
    connection.execute("BEGIN")
    connection.executemany(
        "INSERT INTO impressions VALUES (?, ?, ?, 2, ?, 0, 1, 1, ?, ?)",
        (
            (f"{row:08}-{'x' * 80}", f"user-{row % 999:0100}", f"item-{row % 99:0100}", row, row, f"{row:0100}")
            for row in range(number)
        ),
    )
    connection.execute("COMMIT")
    connection.close()
    program = (
        "import resource, sys; from pathlib import Path; from service.interactions.export import export_logs;"
        "print(export_logs([Path(sys.argv[1])], Path(sys.argv[2])).interactions,"
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), str(path.with_suffix(".out"))],
        capture_output=True, text=True, check=True, timeout=200, env={**os.environ, "POLARS_MAX_THREADS": "1"},
    )  # fmt: skip
    exported, megabytes = done.stdout.split()
    times = pl.read_parquet(path.with_suffix(".out") / "interactions.parquet")["timestamp"]
    assert int(exported) == len(times) == number and times.is_sorted()
    return float(megabytes)
