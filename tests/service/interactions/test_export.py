"""The log as a data folder, read by the one who trains on it."""

from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from models.features import UserFeatures
from service.cli import app
from service.interactions.export import export_log
from service.interactions.histories import merged
from service.interactions.log import EventLog
from tests.service.interactions.conftest import LIMITS, NOW, FakeTime, event
from training.data.dataset import load_dataset
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
    export_log(path, tmp_path)
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
    assert export_log(path, tmp_path / "data") == (1, 0)
    await log.delete("only")
    assert export_log(path, tmp_path / "data") == (0, 1)
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
    assert export_log(path, tmp_path / "out") == (1, 0)
    assert not (tmp_path / "out" / "deleted_users.parquet").exists()


def test_what_is_no_log_is_one_clear_line(tmp_path: Path) -> None:
    for argument in (tmp_path / "missing.sqlite", tmp_path):
        result = CliRunner().invoke(app, ["export", "--interactions", str(argument), "--out", str(tmp_path / "out")])
        assert result.exit_code == 2 and str(argument) in result.output and not (tmp_path / "out").exists()
