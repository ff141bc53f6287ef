"""Follows the log into the store that servers share, from wherever that store stands."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

import structlog

from service.interactions.log import EventLog
from service.interactions.shared import CountTable, SharedInteractions, SharedStoreError
from service.interactions.writer import LogUnavailableError
from service.metrics.interactions import InteractionMetrics

BATCH = 200  # entries of one round trip; reading them takes a millisecond of the event loop
POLL_S = 5.0  # without news: how soon a store that lost everything is filled again
TABLES_S = 2.0  # how often to look for tables of new bundles, which need the earlier entries of this log
DELETIONS_S = 10.0  # how soon a deletion on another server reaches this one's log
FIRST_RETRY_S, LAST_RETRY_S = 0.2, 5.0
ANSWER_S = 10.0  # the store has deadlines of its own; this is for one that forgets them


class Replay:
    """Brings the shared store up to the log, and deletions that the store knows of into the log.

    Where to go on is asked before every batch: the store may have been restarted empty at any time.
    """

    def __init__(
        self,
        log: EventLog,
        shared: SharedInteractions,
        metrics: InteractionMetrics,
        events: structlog.stdlib.BoundLogger,
        on_deleted: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._log = log
        self._shared = shared
        self._on_deleted = on_deleted  # told of users whom other servers have deleted
        self._metrics = metrics
        self._events = events
        self._news = asyncio.Event()
        self._progress = asyncio.Event()
        self._applied = 0
        self._answers = True
        self._deletions_asked = self._tables_asked = float("-inf")
        self._filled: tuple[CountTable, str] | None = (
            None  # the table that is being filled, and the last impression sent
        )

    async def run(self) -> None:
        """Follow the log until cancelled."""
        retry_s = FIRST_RETRY_S
        while True:
            try:
                async with asyncio.timeout(ANSWER_S):
                    done = await self._step()
            except (SharedStoreError, LogUnavailableError, TimeoutError) as error:
                self._tell(False, str(error))
                self._measure()
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, LAST_RETRY_S)
                continue
            retry_s = FIRST_RETRY_S
            self._tell(True)
            if done:
                await self._wait()

    def wake(self) -> None:
        """Tell that the log has grown."""
        self._news.set()

    async def caught_up(self, seq: int, timeout_s: float) -> bool:
        """Wait a short time until the store has an entry, and return whether it has; not for a store that fails."""
        self.wake()
        if not self._answers:
            return False
        try:
            async with asyncio.timeout(timeout_s):
                while self._applied < seq:
                    await self._progress.wait()
        except TimeoutError:
            return False
        return True

    async def _step(self) -> bool:
        """Apply one batch; return whether nothing is left."""
        self._news.clear()
        if time.monotonic() - self._deletions_asked >= DELETIONS_S:  # first: scores may wait for them
            deletions = await self._shared.deletions()
            self._deletions_asked = time.monotonic()
            for user_id in await self._log.take_deletions(deletions.items()):
                self._on_deleted(user_id)
        position = self._log.position()
        told = await self._shared.applied(position.log_id)
        applied = told if told <= position.seq else 0  # a backup of the log was put back: all of it once more
        entries = self._log.read(applied, BATCH)
        if entries:
            await self._shared.apply(position.log_id, entries, told)
            applied = entries[-1].seq
        done = len(entries) < BATCH
        self._advance(position.seq if done else applied, position.seq)
        return await self._fill(position.log_id) and done

    async def _fill(self, log_id: str) -> bool:
        """Send the next earlier impressions to a new table of counts; return whether no table lacks any."""
        if self._filled is None:
            if time.monotonic() - self._tables_asked < TABLES_S:
                return True
            tables = await self._shared.unfilled(log_id)
            if not tables:
                self._tables_asked = time.monotonic()
                return True
            self._filled = tables[0], ""
        table, after = self._filled
        found = await self._log.known_impressions(table.since, after, BATCH)
        last = len(found) < BATCH
        await self._shared.fill(log_id, table, found, last=last)
        self._filled = None if last else (table, found[-1].impression_id)
        return False

    def _advance(self, applied: int, last: int) -> None:
        self._applied = applied
        self._metrics.lag(last - applied)
        self._progress.set()
        self._progress = asyncio.Event()

    async def _wait(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                await self._news.wait()

    def _measure(self) -> None:
        """Tell how far behind a store is that does not answer."""
        with suppress(LogUnavailableError):
            self._metrics.lag(max(0, self._log.position().seq - self._applied))

    def _tell(self, answers: bool, detail: str = "") -> None:
        if answers != self._answers:
            self._answers = answers
            if answers:
                self._events.info("replay_resumed")
            else:
                self._events.warning("replay_waits", detail=detail)
