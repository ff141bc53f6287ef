"""The log's database file: its tables, opened by one process at a time, and never made anew where one is damaged."""

import fcntl
import os
import sqlite3
import stat
import sys
import uuid
from contextlib import suppress
from pathlib import Path

from service.ownership import give

APPLICATION_ID = 0x5E11A106
FORMAT = 1
RESTORED, REPLACED = ".restored", ".replaced"  # beside the log: one that is to take its place, one that was replaced
LINUX = sys.platform == "linux"  # elsewhere `flock` and SQLite's own locks of one file may exclude each other
_RESTS = ("-wal", "-shm")  # of a database that was not closed
BUSY_S = 5.0  # readers never block a writer in WAL mode; a backup's checkpoint may for a moment

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

-- What was acknowledged, in order. `received` is the server's time and never falls with seq.
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    event_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    item_id TEXT NOT NULL,
    label INTEGER,
    timestamp REAL NOT NULL,
    request_id TEXT,
    position INTEGER,
    received REAL NOT NULL,
    impression TEXT DEFAULT ''
);
CREATE INDEX entries_event_user ON entries (event_id, user_id) WHERE kind = 'event';
CREATE INDEX entries_user ON entries (user_id);
CREATE INDEX entries_received ON entries (received) WHERE kind != 'deletion';
CREATE TABLE size (entries INTEGER NOT NULL);
INSERT INTO size VALUES (0);
CREATE TRIGGER entry_in AFTER INSERT ON entries BEGIN UPDATE size SET entries = entries + 1; END;
CREATE TRIGGER entry_out AFTER DELETE ON entries BEGIN UPDATE size SET entries = entries - 1; END;

-- What follows from the entries. state: 0 pending, 1 negative, 2 positive.
CREATE TABLE impressions (
    impression_id TEXT PRIMARY KEY,
    user_id TEXT NOT NULL,
    item_id TEXT NOT NULL,
    state INTEGER NOT NULL,
    shown REAL NOT NULL,
    due REAL NOT NULL,
    first_seq INTEGER NOT NULL,
    last_seq INTEGER NOT NULL,
    like_timestamp REAL,
    like_event_id TEXT
) WITHOUT ROWID;
CREATE INDEX impressions_due ON impressions (due) WHERE state = 0;
CREATE TABLE likes (
    user_id TEXT NOT NULL,
    timestamp REAL NOT NULL,
    event_id TEXT NOT NULL,
    item_id TEXT NOT NULL,
    PRIMARY KEY (user_id, timestamp, event_id)
) WITHOUT ROWID;
CREATE TABLE counts (
    of TEXT NOT NULL,
    id TEXT NOT NULL,
    impressions INTEGER NOT NULL,
    positives INTEGER NOT NULL,
    PRIMARY KEY (of, id)
) WITHOUT ROWID;
CREATE TABLE deletions (user_id TEXT PRIMARY KEY, deleted_at REAL NOT NULL) WITHOUT ROWID;
"""
# A log of an earlier version gets what it lacks when it is opened, and that version can still write it afterwards.
# `impression`: '' in entries of such a version; see `Interaction.impression`.
_LATER_COLUMNS = {"impression": "ALTER TABLE entries ADD COLUMN impression TEXT DEFAULT ''"}
_LATER_INDEXES = (
    "CREATE INDEX IF NOT EXISTS impressions_known ON impressions (user_id, state, shown)",
    "CREATE INDEX IF NOT EXISTS entries_event_user ON entries (event_id, user_id) WHERE kind = 'event'",
    "DROP INDEX IF EXISTS entries_event",
)
_ALL_LIKES = """
INSERT OR IGNORE INTO likes SELECT user_id, like_timestamp, like_event_id, item_id FROM impressions
WHERE like_event_id IS NOT NULL AND NOT EXISTS (SELECT * FROM meta WHERE key = 'likes');
INSERT OR IGNORE INTO meta VALUES ('likes', 'all');
"""  # a log of an earlier version has a user's newest 100 alone; the number of all decides on a prompt's window


class LogFileError(Exception):
    """A file that cannot be used as the log: damaged, of another kind, or held by another process."""


class FileLock:
    """Holds a log for one process. The system lets go of it when the process ends, however it ends.

    Two files are locked: one beside the log, which stands for its name with all links resolved, and the log itself,
    which has one lock under all its names. `descriptor` is the log's. While SQLite has the log open in this process
    the lock must be kept: closing any descriptor of a file drops the locks that SQLite has on it.
    """

    def __init__(self, path: Path) -> None:
        """Take the lock; make the log's file if there is none.

        Raises:
            LogFileError: another process holds it, or it is no file.
            OSError: a file cannot be made.
        """
        real = path.resolve()
        self._beside = _open_or_make(real.with_name(real.name + ".lock"))
        self.descriptor = -1
        try:
            _lock(self._beside)
            take_restored(real)
            self.descriptor = _open_or_make(real)
            self._file = os.fstat(self.descriptor)
            if not stat.S_ISREG(self._file.st_mode):
                raise LogFileError(f"{path}: is no regular file; set SELLA_INTERACTIONS to another path")
            if LINUX:
                _lock(self.descriptor)
        except BaseException as error:
            self.release()
            if isinstance(error, BlockingIOError):
                raise LogFileError(
                    f"{path}: another process writes this log; give each server a SELLA_INTERACTIONS of its own"
                ) from error
            raise

    def holds(self, path: Path) -> bool:
        """Return whether the file that is locked is the one at the path."""
        try:
            return os.path.samestat(path.stat(), self._file)
        except OSError:
            return False

    def release(self) -> None:
        """Let go."""
        for one in (self.descriptor, self._beside):
            if one >= 0:
                os.close(one)


def _open_or_make(path: Path) -> int:
    """Open a file to write; nobody but its owner reads what is made. A pipe at the path must not stop the process."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        give(descriptor, path)
        return descriptor


def _lock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def take_restored(path: Path) -> Path | None:
    """Finish a restore: set the log at `path` aside, with all that belongs to it, and put the restored one there.

    Return where the earlier log is. Cut off anywhere, it goes on when it is called again. The caller holds the lock of
    the log's name.
    """
    restored, aside = path.with_name(path.name + RESTORED), path.with_name(path.name + REPLACED)
    if not restored.exists():
        return None
    if path.exists():
        for rest in _RESTS:
            aside.with_name(aside.name + rest).unlink(missing_ok=True)
        path.replace(aside)
    for rest in _RESTS:  # replayed onto the restored log they would destroy it
        with suppress(FileNotFoundError):
            path.with_name(path.name + rest).replace(aside.with_name(aside.name + rest))
    restored.replace(path)
    sync_folder(path.parent)
    return aside if aside.exists() else None


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_database(path: Path) -> sqlite3.Connection:
    """Open the log's database for writing; fill an empty file.

    Every commit is on disk when it returns. Deleted rows are overwritten with zeros. The connection may be used from
    any one thread. The caller holds the `FileLock`.

    Raises:
        LogFileError: it is damaged or something else; it is left as it is.
        sqlite3.Error, OSError: it cannot be opened now.
    """
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        _check(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")
        if _pragma(connection, "application_id") == 0:
            _create(connection)
        _complete(connection)
    except sqlite3.OperationalError:
        connection.close()
        raise
    except sqlite3.DatabaseError as error:
        connection.close()
        raise _damaged(path, str(error)) from error
    except BaseException:
        connection.close()
        raise
    return connection


def open_to_read(path: Path) -> sqlite3.Connection:
    """Open a log beside the process that writes it.

    Raises:
        LogFileError: there is none, or it is damaged or something else.
    """
    if not path.is_file():
        raise LogFileError(f"{path}: no such file; give the log that SELLA_INTERACTIONS names")
    connection: sqlite3.Connection | None = None
    try:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_S, isolation_level=None
        )
        _check_kind(connection, path)
        if _pragma(connection, "application_id") == 0:
            raise LogFileError(f"{path}: is empty; give the log that SELLA_INTERACTIONS names")
    except (sqlite3.DatabaseError, LogFileError) as error:
        if connection is not None:
            connection.close()
        if isinstance(error, LogFileError):
            raise
        if isinstance(error, sqlite3.OperationalError):
            raise LogFileError(f"{path}: {error}; its folder must be readable and writable") from error
        raise _damaged(path, str(error)) from error
    return connection


def _complete(connection: sqlite3.Connection) -> None:
    """Add what a log of an earlier version lacks."""
    columns = {row[1] for row in connection.execute("PRAGMA table_info(entries)")}
    for name, statement in _LATER_COLUMNS.items():
        if name not in columns:
            connection.execute(statement)
    for statement in (*_LATER_INDEXES, *_statements(_ALL_LIKES)):
        connection.execute(statement)


def _check(connection: sqlite3.Connection, path: Path) -> None:
    _check_kind(connection, path)
    [verdict] = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise _damaged(path, verdict)


def _check_kind(connection: sqlite3.Connection, path: Path) -> None:
    application, version = _pragma(connection, "application_id"), _pragma(connection, "user_version")
    [tables] = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application == 0 and tables == 0:
        return
    if application != APPLICATION_ID:
        raise LogFileError(f"{path}: is a database of something else; set SELLA_INTERACTIONS to another path")
    if version != FORMAT:
        raise LogFileError(f"{path}: is a log of format {version}, this version writes {FORMAT}; move it away")


def _create(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statement in _statements(_TABLES):
            connection.execute(statement)
        connection.execute("INSERT INTO meta VALUES ('log_id', ?)", (uuid.uuid4().hex,))
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _statements(script: str) -> list[str]:
    # `executescript` would commit what came before it.
    found, rest = [], ""
    for line in script.splitlines(keepends=True):
        rest += line
        if sqlite3.complete_statement(rest):
            found.append(rest)
            rest = ""
    return found


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    [value] = connection.execute(f"PRAGMA {name}").fetchone()
    return int(value)


def _damaged(path: Path, detail: str) -> LogFileError:
    first = detail.splitlines()[-1] if detail else "damaged"
    return LogFileError(f"{path}: is damaged ({first}); put a backup in its place, or move it away to begin anew")
