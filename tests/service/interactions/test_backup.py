"""`sella-serve backup`, `restore` and `check`: beside a running server, after a crash, and cut off anywhere."""

import asyncio
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli import app
from service.interactions.backup import back_up, check, restore
from service.interactions.log import EventLog
from tests.service.interactions.conftest import NOW, Open, event

pytestmark = pytest.mark.anyio


def run(*words: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


async def events(log: EventLog) -> list[str]:
    return [entry.interaction.event_id for entry in log.read(0, 10_000) if entry.kind == "event"]


async def after_restart(new_log: Open) -> tuple[EventLog, list[str]]:
    log = new_log()
    await log.start()
    assert log.health().ready, log.health().detail
    return log, await events(log)


@contextmanager
def crashed(log: EventLog, path: Path) -> Iterator[None]:
    """Leave the files as a server that was killed leaves them: the newest entries in the write-ahead file alone."""
    kept = {one: one.read_bytes() for one in path.parent.iterdir() if one.name in (path.name, path.name + "-wal")}
    yield
    for one, content in kept.items():
        one.write_bytes(content)


@pytest.fixture
def open_mask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


async def test_a_backup_is_made_beside_the_writer_again_and_again(
    log: EventLog, path: Path, tmp_path: Path, open_mask: None
) -> None:
    copy = tmp_path / "copy.sqlite"
    for number in range(3):
        await log.append([event(f"e{number}-{one}") for one in range(50)])
        writing = asyncio.create_task(log.append([event(f"beside{number}")]))
        status, output = await asyncio.to_thread(run, "backup", "--interactions", path, "--out", copy)
        assert status == 0, output
        await writing
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        assert check(copy).events in (50 * (number + 1) + number, 50 * (number + 1) + number + 1)
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("copy.sqlite?*"))


async def test_a_backup_that_fails_leaves_the_good_one(log: EventLog, path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.sqlite"
    for number in range(40):
        await log.append([event(f"e{number}-{more}") for more in range(20)])
    back_up(path, copy)
    good = copy.read_bytes()
    await log.close()
    content = bytearray(path.read_bytes())
    content[16_384:] = b"\x99" * (len(content) - 16_384)
    path.write_bytes(content)
    status, output = run("backup", "--interactions", path, "--out", copy)
    assert status == 2 and str(path) in output and "damaged" in output and "Traceback" not in output
    assert copy.read_bytes() == good and not list(tmp_path.glob(".*"))


async def test_a_backup_takes_the_place_of_nothing_else(log: EventLog, path: Path, tmp_path: Path) -> None:
    await log.append([event("e1")])
    (tmp_path / "notes").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE something (x)")
    other.close()
    link = tmp_path / "link"
    link.symlink_to(path)
    for name in ("notes", "other", "pipe", ".", "link", path.name):
        before = path.stat().st_ino
        status, output = run("backup", "--interactions", path, "--out", tmp_path / name)
        assert status == 2 and "name another" in output, (name, output)
        assert path.stat().st_ino == before
    assert (tmp_path / "notes").read_text() == "mine"


async def test_the_rests_of_a_backup_that_was_killed_are_removed_and_those_of_a_running_one_stay(
    log: EventLog, path: Path, tmp_path: Path
) -> None:
    await log.append([event("e1")])
    (tmp_path / ".copy.sqlite.abc.partial").write_bytes(b"half")
    back_up(path, tmp_path / "copy.sqlite")
    assert not list(tmp_path.glob(".*"))


async def test_a_backup_has_nothing_of_who_was_deleted(log: EventLog, path: Path, tmp_path: Path) -> None:
    for number in range(20):
        await log.append([event(f"secret{number}-{one}", user_id="victim") for one in range(20)])
        await log.append([event(f"e{number}-{one}") for one in range(20)])
    await log.delete("victim")
    back_up(path, tmp_path / "copy.sqlite")
    assert b"secret" not in (tmp_path / "copy.sqlite").read_bytes()


async def test_a_restore_after_a_crash_is_the_backup_and_nothing_of_the_log_that_crashed(
    log: EventLog, new_log: Open, path: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.sqlite"
    await log.append([event(f"old{number}", item_id="i" * 200) for number in range(200)])
    back_up(path, copy)
    before = log.position()
    await log.append([event(f"new{number}", item_id="j" * 200) for number in range(300)])
    with crashed(log, path):
        await log.close()
    assert path.with_name(path.name + "-wal").stat().st_size > 100_000
    status, output = run("restore", "--interactions", path, "--backup", copy)
    assert status == 0 and "200 events" in output and "0 deleted users" in output, output
    again, found = await after_restart(new_log)
    assert found == [f"old{number}" for number in range(200)]
    # Its next seqs mean other entries than those that followed the backup before.
    assert again.position().log_id == before.log_id
    assert again.position().epochs[-1] not in before.epochs
    await again.append([event("next")])
    await again.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert check(path).events == 201
    assert check(path.with_name(path.name + ".replaced")).events == 500  # with what was in its write-ahead file
    assert check(copy).events == 200


async def test_a_restore_is_refused_while_a_server_has_the_log(log: EventLog, path: Path, tmp_path: Path) -> None:
    await log.append([event("e1")])
    back_up(path, tmp_path / "copy.sqlite")
    link = tmp_path / "link.sqlite"
    link.symlink_to(path)
    await log.append([event("e2")])
    for name in (path, link):
        status, output = run("restore", "--interactions", name, "--backup", tmp_path / "copy.sqlite")
        assert status == 2 and "stop the server first" in output
    assert await events(log) == ["e1", "e2"]


@pytest.mark.parametrize("damage", ["middle", "noise", "empty", "missing"])
async def test_a_backup_that_is_none_replaces_nothing(
    log: EventLog, new_log: Open, path: Path, tmp_path: Path, damage: str
) -> None:
    copy = tmp_path / "copy.sqlite"
    for number in range(40):
        await log.append([event(f"e{number}-{more}") for more in range(20)])
    back_up(path, copy)
    await log.close()
    content = bytearray(copy.read_bytes())
    content[16_384:32_768] = b"\x99" * 16_384
    if damage == "missing":
        copy.unlink()
    else:
        copy.write_bytes({"middle": bytes(content), "noise": b"noise" * 999, "empty": b""}[damage])
    before = path.read_bytes()
    status, output = run("restore", "--interactions", path, "--backup", copy)
    assert status == 2 and str(copy) in output and "Traceback" not in output
    assert path.read_bytes() == before
    assert run("restore", "--interactions", tmp_path / "fresh.sqlite", "--backup", copy)[0] == 2
    assert not (tmp_path / "fresh.sqlite").exists()
    again, found = await after_restart(new_log)
    assert len(found) == 800
    await again.close()


async def test_a_restore_where_there_is_no_log_makes_one(
    log: EventLog, new_log: Open, path: Path, tmp_path: Path
) -> None:
    await log.append([event("e1")])
    back_up(path, tmp_path / "copy.sqlite")
    await log.close()
    path.unlink()
    assert run("restore", "--interactions", path, "--backup", tmp_path / "copy.sqlite")[0] == 0
    again, found = await after_restart(new_log)
    assert found == ["e1"] and not path.with_name(path.name + ".replaced").exists()
    await again.close()


async def test_who_was_deleted_after_the_backup_stays_deleted(
    log: EventLog, new_log: Open, path: Path, tmp_path: Path
) -> None:
    await log.append(
        [event("e1"), event("secret", user_id="victim"), event("later", user_id="victim", timestamp=NOW + 9)]
    )
    back_up(path, tmp_path / "copy.sqlite")
    await log.delete("victim")
    await log.close()
    status, output = run("restore", "--interactions", path, "--backup", tmp_path / "copy.sqlite")
    assert status == 0 and "1 users who were deleted after the backup" in output
    again, found = await after_restart(new_log)
    assert found == ["e1"] and (await again.live(["victim"]))["victim"].likes == ()
    assert b"secret" not in path.read_bytes()
    assert (await again.append([event("secret", user_id="victim")])).verdicts == ("forgotten",)
    await again.close()


async def test_a_restore_beside_a_damaged_log_says_that_deletions_are_not_known(
    log: EventLog, path: Path, tmp_path: Path
) -> None:
    await log.append([event("e1")])
    back_up(path, tmp_path / "copy.sqlite")
    await log.close()
    path.write_bytes(b"noise" * 999)
    status, output = run("restore", "--interactions", path, "--backup", tmp_path / "copy.sqlite")
    assert status == 0 and "is not known" in output
    assert check(path).events == 1


class CutOffError(Exception):
    pass


@pytest.mark.parametrize("calls", range(8))
async def test_a_restore_that_is_cut_off_has_happened_or_not(
    log: EventLog, new_log: Open, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    await log.append([event(f"old{number}") for number in range(50)])
    back_up(path, tmp_path / "copy.sqlite")
    await log.append([event(f"new{number}") for number in range(50)])
    with crashed(log, path):
        await log.close()
    left, replace = calls, Path.replace

    def cut_off(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise CutOffError
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", cut_off)
        try:
            restore(tmp_path / "copy.sqlite", path)
        except CutOffError:
            assert calls < 5
        else:
            assert calls >= 4
    again, found = await after_restart(new_log)
    assert len(found) == (100 if calls == 0 else 50)
    await again.close()
    if calls:
        assert check(path.with_name(path.name + ".replaced")).events == 100


async def test_check_says_what_a_log_holds_and_what_is_wrong(log: EventLog, path: Path) -> None:
    await log.append([event("e1"), event("e2", None, item_id="i8")])
    await log.delete("gone")
    status, output = run("check", "--interactions", path)
    assert status == 0
    for part in ("2 events", "0 expiries", "1 users", "2 impressions", "1 wait", "1 deleted users", "last seq 3"):
        assert part in output
    await log.close()
    with sqlite3.connect(path) as wrong:
        wrong.execute("UPDATE size SET entries = 7")
    wrong.close()
    status, output = run("check", "--interactions", path)
    assert status == 2 and "damaged" in output
    assert run("check", "--interactions", path.with_name("gone"))[0] == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
async def test_a_log_that_root_restores_belongs_to_the_service(log: EventLog, path: Path, tmp_path: Path) -> None:
    await log.append([event("e1")])
    back_up(path, tmp_path / "copy.sqlite")
    await log.close()
    for place, owner in (("there", path), ("new", None)):
        folder = tmp_path / place
        folder.mkdir()
        os.chown(folder, 10_001, 10_001)
        if owner is not None:
            path.replace(folder / "log.sqlite")
            os.chown(folder / "log.sqlite", 10_001, 10_001)
        restore(tmp_path / "copy.sqlite", folder / "log.sqlite")
        assert {one.stat().st_uid for one in folder.iterdir()} == {10_001}
        assert stat.S_IMODE((folder / "log.sqlite").stat().st_mode) == 0o600
