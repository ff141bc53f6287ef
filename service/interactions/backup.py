"""Copies of the log: made beside the server that writes it, verified, and put back in its place."""

import fcntl
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from service.interactions.database import (
    APPLICATION_ID,
    LINUX,
    RESTORED,
    FileLock,
    LogFileError,
    open_database,
    open_to_read,
    sync_folder,
    take_restored,
)
from service.interactions.ledger import Ledger
from service.ownership import give
from service.settings import Settings

_ATTRIBUTION_S = float(Settings.model_fields["attribution_s"].default)
_KIND = slice(68, 72)  # where a database's file names its kind


class BackupError(Exception):
    """A backup that cannot be written or put back."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a sound log holds; `newest` is when its newest entry was received, UTC seconds, 0 for none."""

    log_id: str
    events: int
    expiries: int
    deletions: int
    impressions: int
    pending: int
    users: int
    last_seq: int
    newest: float


def check(path: Path) -> Contents:
    """Verify every page and index of a log, which may be in use, and return what it holds.

    Raises:
        LogFileError: there is no such log, or it is damaged.
    """
    with closing(open_to_read(path)) as connection:
        return _verified(connection, path)


def back_up(path: Path, out: Path) -> Contents:
    """Copy a log, which may be in use, to a file that only its owner may read, and return what the copy holds.

    The copy is written beside `out`, verified and on disk before it takes the place of an earlier one. It has nothing
    of what was deleted.

    Raises:
        LogFileError: there is no such log, or it is damaged.
        BackupError: the copy cannot be written.
    """
    _require_backup(out, path)
    try:
        _remove_rests(out)
        with closing(open_to_read(path)) as connection, _scratch(out) as copy:
            _copy(connection, path, copy)
            contents = check(copy)
            copy.replace(out)
        sync_folder(out.parent)
    except OSError as error:
        raise BackupError(f"{out}: cannot be written ({error.strerror or error}); make room or name another") from error
    return contents


@dataclass(frozen=True, slots=True)
class Restored:
    """What was put back.

    Attributes:
        deleted: users whose later deletion the replaced log knew, deleted again; None if that log cannot be read.
        replaced: where the replaced log is now; None if there was none.
    """

    contents: Contents
    deleted: int | None
    replaced: Path | None


def restore(backup: Path, path: Path) -> Restored:
    """Put a backup in the place of the log, and that log with what belongs to it aside.

    The log that is there is not touched before the new one is complete, verified and on disk. A restore that is cut
    off has changed nothing, or is finished by the server that opens the log. The new log begins an epoch, because the
    sequence numbers after the backup are given anew: the shared store applies what follows, and counts nothing twice.

    Raises:
        LogFileError: a server writes the log, or the backup is no log or damaged.
        BackupError: the new log cannot be written.
    """
    there = path.exists()
    try:
        with closing(open_to_read(backup)) as source, _held(path):
            real = path.resolve()
            if not there:
                real.unlink()  # the lock has made it
            deletions = _deletions(path) if there else {}
            _verified(source, backup)
            with _scratch(real) as new:
                _copy(source, backup, new)
                deleted = _renewed(new, deletions or {})
                contents = check(new)
                with new.open("r+b") as file:
                    give(file.fileno(), real)
                    os.fsync(file.fileno())
                new.replace(real.with_name(real.name + RESTORED))
            sync_folder(real.parent)
            replaced = take_restored(real)
    except OSError as error:
        raise BackupError(f"{path}: cannot be written ({error.strerror or error}); make room") from error
    return Restored(contents, None if deletions is None else deleted, replaced)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    try:
        lock = FileLock(path)
    except LogFileError as error:
        raise LogFileError(f"{error}; to restore it, stop the server first") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """Give an empty file beside `out` that only its owner may read; what is left of it goes."""
    descriptor, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.", suffix=".partial")
    try:
        if LINUX:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield Path(name)
    finally:
        for rest in ("", "-wal", "-shm"):
            Path(name + rest).unlink(missing_ok=True)
        os.close(descriptor)


def _remove_rests(out: Path) -> None:
    """Remove what backups that were killed have left."""
    for rest in out.parent.glob(f".{out.name}.*.partial") if LINUX else ():
        with suppress(OSError), rest.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            rest.unlink()


def _copy(source: sqlite3.Connection, path: Path, copy: Path) -> None:
    """Write a log as of one moment to an empty file, without what was deleted from it."""
    try:
        source.execute("VACUUM INTO ?", (str(copy),))
    except sqlite3.OperationalError as error:
        raise OSError(str(error)) from error
    except sqlite3.DatabaseError as error:
        raise LogFileError(f"{path}: is damaged ({error}); take an earlier backup") from error
    with copy.open("rb") as file:
        os.fsync(file.fileno())


def _renewed(new: Path, deletions: dict[str, float]) -> int:
    """Begin an epoch in a copy and delete again who was deleted after it was made; return how many."""
    with closing(open_database(new)) as connection:
        ledger = Ledger(connection, _ATTRIBUTION_S)
        known = ledger.deletions()
        later = {one: at for one, at in deletions.items() if known.get(one, float("-inf")) < at}
        connection.execute("BEGIN")
        ledger.begin_epoch()
        for user_id, deleted_at in later.items():
            ledger.delete(user_id, deleted_at, max(time.time(), ledger.last_received()))
        ledger.erased()
        connection.execute("COMMIT")
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return len(later)


def _deletions(path: Path) -> dict[str, float] | None:
    """Return whom a log, as far as it can be read, has deleted; None if it cannot."""
    try:
        with closing(open_to_read(path)) as connection:
            return Ledger(connection, _ATTRIBUTION_S).deletions()
    except (LogFileError, sqlite3.Error):
        return None


def _verified(connection: sqlite3.Connection, path: Path) -> Contents:
    try:
        connection.execute("BEGIN")  # all of one moment
        [verdict] = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise LogFileError(f"{path}: is damaged ({verdict}); take an earlier backup")
        kinds = dict(connection.execute("SELECT kind, count(*) FROM entries GROUP BY kind"))
        [impressions, pending] = connection.execute("SELECT count(*), total(state = 0) FROM impressions").fetchone()
        [users] = connection.execute("SELECT count(DISTINCT user_id) FROM impressions").fetchone()
        ledger = Ledger(connection, _ATTRIBUTION_S)
        if ledger.entries() != sum(kinds.values()):
            raise LogFileError(f"{path}: is damaged (it counts {ledger.entries()} entries and has {kinds})")
        return Contents(
            ledger.log_id,
            kinds.get("event", 0),
            kinds.get("expiry", 0),
            len(ledger.deletions()),
            impressions,
            int(pending),
            users,
            ledger.last_seq(),
            ledger.last_received(),
        )
    except sqlite3.DatabaseError as error:
        raise LogFileError(f"{path}: is damaged ({error}); take an earlier backup") from error
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _require_backup(out: Path, path: Path) -> None:
    """Refuse to write over what is no backup."""
    if not out.exists():
        return
    if not out.is_file() or (path.exists() and out.samefile(path)):
        raise BackupError(f"{out}: is no file for a backup; name another")
    with out.open("rb") as file:
        head = file.read(100)
    if head and int.from_bytes(head[_KIND], "big") != APPLICATION_ID:
        raise BackupError(f"{out}: is a file of something else; remove it or name another")
