"""One thread that writes the log: what waits together shares one commit, and so one wait for the disk."""

import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from service.interactions.counts import LogChange
from service.interactions.database import FileLock, LogFileError, open_database
from service.interactions.erasure import Erasure
from service.interactions.ledger import Ledger

T = TypeVar("T")

WAITING = 512  # jobs; each is a request's batch, and a client waits for it
A_COMMIT = 64  # jobs of one commit, so that the first of them does not wait for hundreds
ERASE_S, ERASE_SHARE = 0.05, 4  # between two steps of the erasure: this long, and this many times the step before
CLOSE_S = 10.0  # a disk that does not answer must not keep the process from ending
NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)  # the disk's limit, or one of a quota or of the process
RETRY_S = 2.0  # between attempts to open a log that could not be opened


class LogUnavailableError(Exception):
    """The log cannot be written now. Nothing was taken; the same ids may be sent again."""


class LogUnansweredError(LogUnavailableError):
    """The disk has not said whether it took a write. The same ids may be sent again: what was taken counts once."""


@dataclass(frozen=True, slots=True)
class LogHealth:
    """Whether the log takes entries; the detail names the file and, if it does not, why."""

    ready: bool
    detail: str


@dataclass(frozen=True, slots=True)
class _Job:
    work: Callable[[Ledger], Any]
    erases: bool
    done: "Future[Any]"


class Writer:
    """Opens the log, and opens it again after a failure; runs work in transactions that are on disk when they end."""

    def __init__(
        self,
        path: Path,
        attribution_s: float,
        on_open: Callable[[Ledger], None],
        on_commit: Callable[[Sequence[LogChange]], None] = lambda _: None,
    ) -> None:
        """The writer's thread calls both. `on_open` is called each time after the log is opened. `on_commit` gets the
        changes of each commit, before the jobs of the commit learn that it is on disk; it must not raise.
        """
        self._path = path
        self._attribution_s = attribution_s
        self._on_open = on_open
        self._on_commit = on_commit
        self._jobs: queue.Queue[_Job | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="interactions", daemon=True)
        self._lock: FileLock | None = None
        self._connection: sqlite3.Connection | None = None
        self._ledger: Ledger | None = None
        self._epoch_begun = False
        self._tried = float("-inf")
        self._committing = False
        self._busy_since: float | None = None  # monotonic seconds
        self._erasure: Erasure | None = None
        self._remnants = False  # bytes of deleted rows may still be in the files
        self._erase_at = float("-inf")
        self.health = LogHealth(False, f"{path}: not opened")

    def start(self) -> None:
        """Start the thread; the first job opens the log."""
        self._thread.start()

    def submit(self, work: Callable[[Ledger], T], *, erases: bool = False) -> "Future[T]":
        """Run work in a transaction, alone in its savepoint; its own exceptions undo it and nothing else.

        `erases`: what the work deletes must leave the disk soon, the write-ahead file included. The future fails with
        `LogUnavailableError` when the work is not on disk.
        """
        job = _Job(work, erases, Future())
        if not self._thread.is_alive():
            job.done.set_exception(LogUnavailableError(f"{self._path}: not started, or stopped"))
            return job.done
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            job.done.set_exception(LogUnavailableError(f"{self._path}: {WAITING} writes wait for the disk"))
        return job.done

    def busy_s(self) -> float:
        """Return for how many seconds the disk has not answered; any thread may ask."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def stop(self) -> None:
        """Do what waits, close the log and end; a disk that does not answer is left to the end of the process."""
        if self._thread.is_alive():
            with suppress(queue.Full):
                self._jobs.put(None, timeout=CLOSE_S)
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        running = True
        while running:
            self._busy_since = None
            waiting = self._waiting()
            self._busy_since = time.monotonic()
            running = None not in waiting
            # Who no longer waits is not written down.
            self._commit([job for job in waiting if job is not None and job.done.set_running_or_notify_cancel()])
            if running and self._remnants and time.monotonic() >= self._erase_at:
                self._erase()
        self.health = LogHealth(False, f"{self._path}: closed")
        self._close()
        self._release()

    def _waiting(self) -> "list[_Job | None]":
        """Wait for jobs, and for the next step of an erasure at the longest."""
        try:
            wait_s = max(0.0, self._erase_at - time.monotonic()) if self._remnants else None
            waiting = [self._jobs.get(timeout=wait_s)]
        except queue.Empty:
            return []
        while len(waiting) < A_COMMIT and not self._jobs.empty():
            waiting.append(self._jobs.get())
        return waiting

    def _commit(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        self._committing = False
        try:
            outcomes = self._transaction(self._open(), jobs)
        except LogUnavailableError as error:
            outcomes = [error] * len(jobs)
        except Exception as error:  # whatever it is, who waits must hear of it, and the thread must live
            detail = str(error) if isinstance(error, LogFileError) else f"{self._path}: {error}"
            self.health = LogHealth(False, detail)
            unknown = self._committing
            if self._undone(error):
                unknown = False
            else:
                self._close()
            outcomes = [(LogUnansweredError if unknown else LogUnavailableError)(detail)] * len(jobs)
        for job, outcome in zip(jobs, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                job.done.set_exception(outcome)
            else:
                job.done.set_result(outcome)

    def _transaction(self, ledger: Ledger, jobs: list[_Job]) -> list[Any]:
        assert self._connection is not None
        self._require_in_place()
        run = self._connection.execute
        ledger.changes.clear()
        run("BEGIN IMMEDIATE")
        if not self._epoch_begun:
            ledger.begin_epoch()
        outcomes: list[Any] = []
        for job in jobs:
            run("SAVEPOINT job")
            changes = len(ledger.changes)
            try:
                outcomes.append(job.work(ledger))
            except (sqlite3.Error, OSError):
                raise
            except Exception as error:
                run("ROLLBACK TO job")
                del ledger.changes[changes:]
                outcomes.append(error)
            run("RELEASE job")
        self._committing = True
        run("COMMIT")
        self._committing = False
        self._epoch_begun = True
        self._on_commit(ledger.changes)
        if any(job.erases for job in jobs):
            self._begin_to_erase()
        self.health = LogHealth(True, f"{self._path}: {ledger.entries()} entries")
        return outcomes

    def _require_in_place(self) -> None:
        """Refuse to write into a file that nobody would find again.

        The connection stays: what was taken before can still be read, and the file may be put back.

        Raises:
            LogUnavailableError: another file stands at the path, or none.
        """
        if self._lock is not None and self._lock.holds(self._path):
            return
        detail = f"{self._path}: was removed or replaced while in use; put it back, or restart with what is there"
        self.health = LogHealth(False, detail)
        raise LogUnavailableError(detail)

    def _begin_to_erase(self) -> None:
        assert self._erasure is not None
        self._erasure.begin()
        self._remnants = True

    def _erase(self) -> None:
        """Go on to erase what deleted rows have left in the files."""
        if self._erasure is None or self._ledger is None:
            self._remnants = False  # opening the log begins anew
            return
        started = time.monotonic()
        with suppress(sqlite3.Error, OSError):  # no room, or a reader in the way: later once more
            if self._erasure.step():
                self._ledger.erased()
                self._remnants = False
        self._erase_at = time.monotonic() + max(ERASE_S, ERASE_SHARE * (time.monotonic() - started))

    def _undone(self, error: Exception) -> bool:
        """Return whether a failed transaction is undone and the connection as good as before."""
        full = isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode in NO_ROOM
        if self._connection is None or not full:
            return False  # after another error of the disk nothing is known of the connection: begin with a new one
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error:
            return False
        return True

    def _open(self) -> Ledger:
        if self._ledger is not None:
            return self._ledger
        if time.monotonic() - self._tried < RETRY_S:
            raise LogUnavailableError(self.health.detail)
        self._tried = time.monotonic()
        if self._lock is None or not self._lock.holds(self._path):
            self._release()
            self._lock = FileLock(self._path)
        self._connection = open_database(self._path)
        self._ledger = Ledger(self._connection, self._attribution_s)
        self._epoch_begun = False
        self._erasure = Erasure(self._connection, self._lock.descriptor)
        if self._ledger.remnants():
            self._begin_to_erase()
        self._on_open(self._ledger)
        return self._ledger

    def _close(self) -> None:
        if self._connection is not None:
            try:
                self._connection.close()
            except sqlite3.Error as error:
                self.health = LogHealth(False, f"{self._path}: {error}")
        self._connection = self._ledger = self._erasure = None

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._lock = None
