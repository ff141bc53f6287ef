import gc
import os
import threading
import time
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from service.access.key_file import CHECK_S, KeyFile
from service.access.keys import KeyFileError

A, B = "a" * 16, "b" * 16


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "keys", f"shop:{A}\n")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def names(file: KeyFile) -> list[str]:
    return [key.name for key in file.ring().keys]


def test_a_changed_file_is_read_again_after_a_second(path: Path) -> None:
    clock = Clock()
    file = KeyFile(path, structlog.get_logger(), clock)
    write(path, f"mail:{B}\n")
    clock.now = CHECK_S / 2
    assert names(file) == ["shop"]
    clock.now = CHECK_S
    with capture_logs() as logs:
        assert names(file) == ["mail"]
    assert file.ring().find(A.encode()) is None
    assert [(one["event"], one["names"]) for one in logs] == [("keys_changed", ["mail"])]
    assert A not in str(logs) and B not in str(logs)


def test_a_replaced_file_with_an_equal_time_and_size_is_read_again(path: Path, tmp_path: Path) -> None:
    clock = Clock()
    file = KeyFile(path, structlog.get_logger(), clock)
    times = path.stat()
    other = write(tmp_path / "new", f"mail:{B}\n")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(path)
    clock.now = CHECK_S
    assert names(file) == ["mail"]


@pytest.mark.parametrize("text", ["", "mail:short\n", f"mail:{B}\nmail:{B}\n", None])
def test_a_broken_file_keeps_the_keys_and_is_one_error(path: Path, text: str | None) -> None:
    clock = Clock()
    file = KeyFile(path, structlog.get_logger(), clock)
    if text is None:
        path.unlink()
    else:
        write(path, text)
    with capture_logs() as logs:
        for _ in range(5):
            clock.now += CHECK_S
            assert names(file) == ["shop"]
    assert [(one["event"], one["log_level"], one["kept"]) for one in logs] == [("keys_refused", "error", 1)]
    write(path, f"shop:{A}\nmail:{B}\n")
    clock.now += CHECK_S
    assert names(file) == ["shop", "mail"]


def test_at_the_start_a_broken_file_is_an_error(path: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot be read: No such file"):
        KeyFile(path.with_name("gone"), structlog.get_logger())
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(KeyFileError, match="not UTF-8 text at byte 0"):
        KeyFile(path, structlog.get_logger())
    path.write_text("#" * 2_000_000)
    with pytest.raises(KeyFileError, match="longer than 1048576 bytes"):
        KeyFile(path, structlog.get_logger())


def test_a_file_that_everybody_can_read_is_warned_of(path: Path) -> None:
    with capture_logs() as logs:
        KeyFile(path, structlog.get_logger())
        path.chmod(0o644)
        KeyFile(path, structlog.get_logger())
    assert [(one["event"], one["log_level"]) for one in logs] == [("keys_readable_by_all", "warning")]


def test_a_watched_file_is_followed_by_itself_until_nobody_has_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.access.key_file.CHECK_S", 0.01)
    file = KeyFile(path, structlog.get_logger())
    thread = file.watch()
    write(path, f"mail:{B}\n")
    end = time.monotonic() + 20
    while names(file) != ["mail"]:
        assert time.monotonic() < end
        time.sleep(0.005)
    assert thread.is_alive()
    del file
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_a_disk_that_does_not_answer_keeps_nobody_waiting(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.access.key_file.CHECK_S", 0.01)
    file = KeyFile(path, structlog.get_logger())
    asked, answer, stat = threading.Event(), threading.Event(), Path.stat

    def hangs(self: Path, **more: bool) -> os.stat_result:
        if self == path:
            asked.set()
            answer.wait(20)
        return stat(self, **more)

    monkeypatch.setattr(Path, "stat", hangs)
    file.watch()
    assert asked.wait(20)
    began = time.monotonic()
    for _ in range(100):
        assert names(file) == ["shop"]
    assert time.monotonic() - began < 1
    answer.set()


def test_a_pipe_is_refused_at_the_start_and_later_and_nobody_waits_for_its_writer(path: Path) -> None:
    clock = Clock()
    file = KeyFile(path, structlog.get_logger(), clock)
    path.unlink()
    os.mkfifo(path)
    clock.now = CHECK_S
    with capture_logs() as logs:
        assert names(file) == ["shop"]
    [refused] = logs
    assert refused["event"] == "keys_refused" and "no regular file" in refused["reason"]
    for other in (path, path.parent, Path("/dev/null")):
        with pytest.raises(KeyFileError, match=r"no regular file|Is a directory"):
            KeyFile(other, structlog.get_logger())
