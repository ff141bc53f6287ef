"""The event log as the service uses it: what it has acknowledged is on disk."""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from models.fusion import Counts
from service.interactions import replayed
from service.interactions.clock import Clock
from service.interactions.counts import LiveCounts, LogChange
from service.interactions.database import LogFileError, open_to_read
from service.interactions.epochs import Position
from service.interactions.event import Interaction, LogEntry
from service.interactions.ledger import CountOf, EventConflictError, Ledger, Resolved, Taken
from service.interactions.live import USERS_AT_ONCE, Ends, LiveUser, nothing_stored
from service.interactions.shared import Impression, KnownBefore
from service.interactions.writer import LogHealth, LogUnansweredError, LogUnavailableError, Writer
from service.metrics.interactions import InteractionMetrics

__all__ = ["EventConflictError", "EventLog", "LogLimits", "LogUnansweredError", "LogUnavailableError", "Position"]

T = TypeVar("T")

DISK_S = 10.0  # a disk that takes longer counts as gone; the client sends the same ids again
LASTING = 0.9  # of the retention: what is younger cannot have ended elsewhere by a clock's difference
# Expiries and prunings of one commit end after this time, so that interactions do not wait behind them: each touches
# several pages anywhere in the file.
ROUND_S, AT_ONCE = 0.012, 25


@dataclass(frozen=True, slots=True)
class LogLimits:
    """How long, in seconds, an impression waits for its outcome, and an entry stays."""

    attribution_s: float
    retention_s: float


class EventLog:
    """One log file, for one process, used from one event loop.

    Reading never waits for writing, and is fast enough for the event loop: 20 microseconds for a user without events,
    300 for a user with a hundred likes and ten thousand outcomes, from a file that the system holds in memory.
    """

    def __init__(self, path: Path, limits: LogLimits, clock: Clock, metrics: InteractionMetrics) -> None:
        self._path = path
        self._limits = limits
        self._clock = clock
        self._metrics = metrics
        self._writer = Writer(path, limits.attribution_s, self._opened, self._committed)
        self._reader: Ledger | None = None
        self._read_connection: sqlite3.Connection | None = None
        self._reader_error = ""
        self._ever_opened = False
        self._filling = asyncio.Lock()
        self._counts: tuple[LiveCounts, ...] = ()  # replaced as a whole, because the writer's thread reads it
        self._deleted: dict[str, float] = {}  # for a log that cannot be read any more
        self.behind = False  # whether `sweep` has left some
        self.deletions_known = False  # whether this log, or this process, has heard of the deletions at other servers

    async def start(self) -> None:
        """Open the log, if that can be done now."""
        self._writer.start()
        await self.sweep()

    def register(self, counts: LiveCounts) -> None:
        """Keep a bundle's live counts up to date; they are filled when the log is opened, or by `fill_counts`."""
        self._counts += (counts,)

    def unregister(self, counts: LiveCounts) -> None:
        """Stop updating a bundle's live counts."""
        self._counts = tuple(one for one in self._counts if one is not counts)

    async def fill_counts(self) -> None:
        """Fill live counts that are not filled yet, in a thread; if the log cannot be read they stay as they are."""
        async with self._filling:
            for counts in self._counts:
                if self._ever_opened and not counts.live:
                    with suppress(sqlite3.Error, LogFileError):
                        await asyncio.to_thread(self._fill, counts)

    async def append(self, batch: Sequence[Interaction], late: Callable[[Taken], None] | None = None) -> Taken:
        """Take a batch, all of it or nothing; it is on disk when this returns.

        Raises:
            EventConflictError: an event id is in the log with other content.
            LogUnansweredError: the disk does not answer; `late` is called if it takes the batch after all.
            LogUnavailableError: the log cannot be written now.
        """
        started = time.monotonic()
        taken = await self._write(lambda ledger: ledger.take(batch, self._clock.steady()), late=late)
        self._metrics.appended(time.monotonic() - started)
        return taken

    async def delete(self, user_id: str, late: Callable[[], None] | None = None) -> tuple[float, int]:
        """Forget a user, on disk too; return when, UTC seconds not before anything forgotten, and the tombstone's seq.

        Raises:
            LogUnansweredError: the disk does not answer; `late` is called if the user is deleted after all.
            LogUnavailableError: the log cannot be written now.
        """

        def work(ledger: Ledger) -> tuple[float, int]:
            # A client's clock may be ahead of ours: what it sent before must not come back by being sent again.
            deleted_at = max(self._clock.wall(), ledger.newest_timestamp(user_id) or 0.0)
            return deleted_at, ledger.delete(user_id, deleted_at, self._clock.steady())

        def known(done: tuple[float, int]) -> None:
            self._deleted[user_id] = done[0]
            if late is not None:
                late()

        deleted_at, seq = await self._write(work, erases=True, late=known)
        self._deleted[user_id] = deleted_at
        return deleted_at, seq

    async def take_deletions(self, deletions: Iterable[tuple[str, float]], *, all_told: bool = True) -> tuple[str, ...]:
        """Forget users whom other servers have deleted, as of the given times; return those who were news.

        `all_told` is False where the other servers have deleted more users than these.

        What came here before a deletion goes with it, dated later or not, and the deletion moves to that date: a
        client's clock may be ahead of ours.

        Raises:
            LogUnavailableError: the log cannot be written now.
        """
        deletions = list(deletions)
        # First in memory, which needs no file.
        self._deleted |= {user: when for user, when in deletions if self._deleted.get(user, float("-inf")) < when}
        known_before = self.deletions_known
        self.deletions_known = (
            known_before or all_told
        )  # if the log cannot be written now, `sweep` writes it down later

        def unknown(ledger: Ledger, some: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
            told = [(user, when, ledger.deleted_at(user)) for user, when in some]
            return [(user, when) for user, when, known in told if known is None or known < when]

        asked = await self._apart(lambda ledger: unknown(ledger, deletions))

        def work(ledger: Ledger) -> dict[str, float]:
            news = {}
            for user_id, when in asked:
                if unknown(ledger, [(user_id, when)]):
                    news[user_id] = max(when, ledger.newest_timestamp(user_id, received_by=when) or when)
                    ledger.delete(user_id, news[user_id], self._clock.steady())
            if self.deletions_known:
                ledger.know_deletions()
            return news

        if not asked and known_before == self.deletions_known:
            return ()
        forgotten = await self._write(work, erases=bool(asked))
        self._deleted.update(forgotten)
        return tuple(forgotten)

    async def sweep(self) -> tuple[Resolved, ...]:
        """Expire impressions, drop old entries, and find out whether the log takes entries; never raises.

        Return what has become negative. It ends early where there is much to do; `behind` then tells that some is left.
        """

        def work(ledger: Ledger) -> tuple[bool, list[Resolved]]:
            if not self._writer.health.ready:
                ledger.probe()
            if self.deletions_known and not ledger.deletions_known():
                ledger.know_deletions()
            now = self._clock.steady()
            # Of two clocks the earlier one: one that was set ahead must not empty the log.
            old = min(now, self._clock.wall()) - self._limits.retention_s
            pruned, expired = AT_ONCE, AT_ONCE
            resolved: list[Resolved] = []
            until = time.monotonic() + ROUND_S
            while pruned == AT_ONCE and time.monotonic() < until:
                pruned = ledger.prune(old, AT_ONCE)
            until = time.monotonic() + ROUND_S
            while expired == AT_ONCE and time.monotonic() < until:
                some = ledger.expire(now, AT_ONCE)
                resolved += some
                expired = len(some)
            return AT_ONCE in (pruned, expired), resolved

        self.behind = False
        try:
            self.behind, resolved = await self._write(work)
        except LogUnavailableError:
            return ()
        self._metrics.expired(len(resolved))
        if self._reader_error:  # else it stood in /readyz until the next score
            with suppress(LogUnavailableError):
                self.position()
        return tuple(resolved)

    def read(self, after: int, limit: int) -> list[LogEntry]:
        """Return entries behind a seq, in order.

        Raises:
            LogUnavailableError: the log cannot be read now.
        """
        return self._read(lambda ledger: ledger.read(after, limit))

    def position(self) -> Position:
        """Return which log this is and its last seq.

        Raises:
            LogUnavailableError: the log cannot be read now.
        """
        return self._read(lambda ledger: ledger.position())

    async def begin_epoch(self) -> None:
        """Begin an epoch: somebody knows of entries behind the last one, of a log that this one is a backup of.

        Raises:
            LogUnavailableError: the log cannot be written now.
        """
        await self._write(lambda ledger: ledger.begin_epoch())

    def counts(self, of: CountOf, ids: Iterable[str]) -> dict[str, Counts]:
        """Return impressions with a known outcome and positives, of users or items.

        Raises:
            LogUnavailableError: the log cannot be read now.
        """
        return self._read(lambda ledger: ledger.counts(of, ids))

    async def known_before(self, entries: Sequence[LogEntry]) -> dict[int, KnownBefore]:
        """Return by seq what the log knew before entries that come after the attribution window of their impression.

        Raises:
            LogUnavailableError: the log cannot be read now.
        """
        some = self._read(lambda ledger: replayed.late(ledger.connection, entries, self._clock.steady()))
        if not some:
            return {}
        return await self._apart(lambda ledger: replayed.known_before(ledger.connection, some))

    async def known_impressions(self, since: float, after: str, limit: int, until_seq: int) -> list[Impression]:
        """Return impressions with a known outcome, by id: shown after `since`, first told of at `until_seq` at the
        latest, with an id greater than `after`.

        Raises:
            LogUnavailableError: the log cannot be read now.
        """
        return await self._apart(
            lambda ledger: replayed.known_impressions(ledger.connection, since, after, limit, until_seq)
        )

    async def users_with_likes(self, after: str, limit: int) -> list[str]:
        """Return users with likes that are not near the end of their retention, by id, behind `after`.

        Raises:
            LogUnavailableError: the log cannot be read now.
        """
        received = self._clock.steady() - LASTING * self._limits.retention_s
        return await self._apart(lambda ledger: replayed.users_with_likes(ledger.connection, received, after, limit))

    async def deletions(self, after: str, limit: int) -> list[tuple[str, float]]:
        """Return deleted users and when, by id, behind `after`.

        Raises:
            LogUnavailableError: the log cannot be read now.
        """
        return await self._apart(lambda ledger: replayed.deletions(ledger.connection, after, limit))

    async def live(self, user_ids: Iterable[str], ends: Ends = nothing_stored) -> dict[str, LiveUser]:
        """Return likes, outcomes and deletions of users.

        If the log cannot be read, likes and outcomes are missing: the score does not fail. This process keeps the
        deletions that it knows, even without the file.
        """
        users = list(user_ids)
        found: dict[str, LiveUser] = {}
        for first in range(0, len(users), USERS_AT_ONCE):
            if first:
                await asyncio.sleep(0)
            some = users[first : first + USERS_AT_ONCE]
            try:
                found |= self._read(lambda ledger, some=some: ledger.live(some, ends))  # type: ignore[misc]
            except LogUnavailableError:
                break
        for one in self._deleted.keys() & set(users):
            known = found.get(one, LiveUser())
            if known.deleted_at is None or known.deleted_at < self._deleted[one]:
                found[one] = replace(known, deleted_at=self._deleted[one])
        return found

    def health(self) -> LogHealth:
        """Return whether the log takes entries and can be read."""
        if self._stalled():
            return LogHealth(False, f"{self._path}: the disk has not answered for {DISK_S:g} s")
        health = self._writer.health
        if health.ready and self._reader_error:
            return LogHealth(False, self._reader_error)
        return health

    async def close(self) -> None:
        """Write what waits and close the file."""
        self._drop_reader()  # first, so that who closes last empties the write-ahead file
        self._ever_opened = False
        await asyncio.to_thread(self._writer.stop)
        self._metrics.log(False, None)

    async def _write(
        self, work: Callable[[Ledger], T], *, erases: bool = False, late: Callable[[T], None] | None = None
    ) -> T:
        def counted(ledger: Ledger) -> tuple[T, int]:
            return work(ledger), ledger.entries()

        future: Future[tuple[T, int]] = self._writer.submit(counted, erases=erases)
        waiting = asyncio.wrap_future(future)
        try:
            await asyncio.wait((waiting,), timeout=DISK_S)
        finally:
            if not waiting.done():
                waiting.add_done_callback(lambda done: _late(done, late))
                begun = not future.cancel()
        try:
            if not waiting.done():
                if begun:
                    raise LogUnansweredError(f"{self._path}: the disk has not answered in {DISK_S:g} s")
                raise LogUnavailableError(f"{self._path}: nothing was written in {DISK_S:g} s")
            result, entries = waiting.result()
        except LogUnavailableError:
            self._metrics.log(False, None)
            raise
        self._metrics.log(True, entries)
        return result

    def _opened(self, ledger: Ledger) -> None:
        self._clock.not_before(ledger.last_received())
        self._deleted = {**self._deleted, **ledger.deletions()}
        self.deletions_known = self.deletions_known or ledger.deletions_known()
        for counts in self._counts:
            counts.refill(*ledger.counted_since(counts.until))
        self._ever_opened = True

    def _committed(self, changes: Sequence[LogChange]) -> None:
        for counts in self._counts:
            counts.apply(changes)

    def _fill(self, counts: LiveCounts) -> None:
        def fill(ledger: Ledger) -> None:
            counts.collect()
            counts.fill(ledger.last_seq(), *ledger.counted_since(counts.until))

        self._read_apart(fill)

    def _read_apart(self, work: Callable[[Ledger], T]) -> T:
        """Read one snapshot on a separate connection: a query of the whole log would block the event loop."""
        connection = open_to_read(self._path)
        try:
            ledger = Ledger(connection, self._limits.attribution_s)
            connection.execute("BEGIN")
            return work(ledger)
        finally:
            connection.close()

    async def _apart(self, work: Callable[[Ledger], T]) -> T:
        if not self._ever_opened:
            raise LogUnavailableError(self._writer.health.detail)
        try:
            return await asyncio.to_thread(self._read_apart, work)
        except (sqlite3.Error, LogFileError) as error:
            raise LogUnavailableError(f"{self._path}: {error}") from error

    def _stalled(self) -> bool:
        return self._ever_opened and self._writer.busy_s() > DISK_S

    def _read(self, work: Callable[[Ledger], T]) -> T:
        if self._stalled():  # reading could stop the event loop with it
            raise LogUnavailableError(self.health().detail)
        if not self._ever_opened:
            # Another process may hold it, and what it holds may be damaged: neither is read.
            raise LogUnavailableError(self._writer.health.detail)
        try:
            if self._reader is None:
                self._read_connection = open_to_read(self._path)
                self._reader = Ledger(self._read_connection, self._limits.attribution_s)
            result = work(self._reader)
        except (sqlite3.Error, LogFileError) as error:
            self._drop_reader()
            self._reader_error = str(error) if isinstance(error, LogFileError) else f"{self._path}: {error}"
            raise LogUnavailableError(self._reader_error) from error
        self._reader_error = ""
        return result

    def _drop_reader(self) -> None:
        if self._read_connection is not None:
            self._read_connection.close()
        self._read_connection = self._reader = None


def _late(done: "asyncio.Future[tuple[T, int]]", late: Callable[[T], None] | None) -> None:
    """Tell what a write became for which nobody waits any more."""
    if not done.cancelled() and done.exception() is None and late is not None:
        late(done.result()[0])
