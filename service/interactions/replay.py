"""Follows the log into the store that servers share, from wherever that store stands."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import structlog

from service.interactions.epochs import Position
from service.interactions.log import EventLog
from service.interactions.shared import CountTable, SharedInteractions, SharedStoreError
from service.interactions.writer import LogUnavailableError
from service.metrics.interactions import InteractionMetrics

BATCH = 200  # entries of one round trip; reading them takes a millisecond of the event loop
POLL_S = 5.0  # without news: how soon a store that lost everything is filled again
TABLES_S = 2.0  # how often to look for tables of new bundles, which need the earlier entries of this log
DELETIONS_S = 10.0  # how soon a deletion on another server reaches this one's log
DELETIONS = 1000  # of one round trip
AUDIT_S = 5.0  # how often to look whether the store has lost something
AUDITED = 500  # users of one look
AGAIN_S = 600.0  # a store that goes on losing keys is filled again this often at most
FIRST_RETRY_S, LAST_RETRY_S = 0.2, 5.0
CANCEL_S = 0.5  # after which a task that goes on is cancelled again
ANSWER_S = 10.0  # the store has deadlines of its own; this is for one that forgets them


class Replay:
    """Brings the shared store up to the log, and deletions that the store knows of into the log.

    Where to go on is asked before every batch: the store may have been restarted empty at any time, and the log may be
    a backup. What the store has lost beside that is looked for, some users at a time.
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
        self._deletions_asked = self._tables_asked = self._began_again = float("-inf")
        self._mark = float("-inf")  # deletions up to here are in the log
        self._audit_users = self._audit_deletions = ""  # whom the last look ended with
        self._filling: CountTable | None = None  # the table that is being filled

    async def run(self) -> None:
        """Follow the log until cancelled."""
        audit = asyncio.create_task(self._audit_forever())
        try:
            await self._follow()
        finally:
            while not audit.done():
                # Before Python 3.12 `asyncio.wait_for` loses a cancellation that comes as its future ends.
                audit.cancel()
                await asyncio.wait([audit], timeout=CANCEL_S)

    async def _follow(self) -> None:
        retry_s = FIRST_RETRY_S
        while True:
            try:
                async with asyncio.timeout(ANSWER_S):
                    done = await self._step()
            except (SharedStoreError, LogUnavailableError, TimeoutError) as error:
                self._filling = None  # how far it was filled is asked again
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
            await self._take_deletions()
        position = self._log.position()
        done = await self._apply(position)
        return await self._fill(position) and done

    async def _apply(self, position: Position) -> bool:
        """Apply the next entries that the store lacks; return whether there are no more."""
        told = await self._shared.applied([one.id for one in position.epochs])
        if told[-1] > position.seq:  # a backup was put back, and its own epoch has not begun
            await self._log.begin_epoch()
            return False
        for place in position.places(told):
            entries = [one for one in self._log.read(place.seq, BATCH) if one.seq <= place.end]
            if not entries:  # those that were left of an earlier epoch are deleted
                continue
            known = await self._log.known_before(entries)
            await self._shared.apply(
                *(position.epochs[place.number].id, entries, told[place.number]),
                log_id=position.log_id,
                known=known,
                anew=not any(told),
            )
            done = entries[-1].seq == position.seq
            self._advance(entries[-1].seq, position.seq)
            return done
        self._advance(position.seq, position.seq)
        return True

    async def _take_deletions(self) -> None:
        """Forget, here too, whom other servers have deleted since the last time."""
        found = await self._shared.deletions(self._mark, DELETIONS)
        for user_id in await self._log.take_deletions(found.users, all_told=not found.more):
            self._on_deleted(user_id)
        self._mark = found.mark
        if not found.more:
            self._deletions_asked = time.monotonic()

    async def _audit_forever(self) -> None:
        while True:
            await asyncio.sleep(AUDIT_S)
            with suppress(SharedStoreError, LogUnavailableError, TimeoutError):
                async with asyncio.timeout(ANSWER_S):
                    await self._audit()

    async def _audit(self) -> None:
        """Look whether the store has lost likes of some users, or was made to remove keys; then fill it anew."""
        users = await self._log.users_with_likes(self._audit_users, AUDITED)
        deletions = await self._log.deletions(self._audit_deletions, AUDITED)
        position = self._log.position()
        while self._applied < position.seq:
            await self._progress.wait()
        if not any(await self._shared.applied([one.id for one in position.epochs])):
            return  # it has nothing of this log: what it lacks is about to be applied
        self._audit_users = users[-1] if len(users) == AUDITED else ""
        self._audit_deletions = deletions[-1][0] if len(deletions) == AUDITED else ""
        lost = await self._shared.lost(users, deletions)
        if lost:
            self._metrics.lost()
            again = time.monotonic() - self._began_again >= AGAIN_S
            self._events.warning("replay_lost", detail="; ".join(lost), fills_again=again)
            if again:
                self._began_again = time.monotonic()
                await self._shared.begin_again()

    async def _fill(self, position: Position) -> bool:
        """Send the next earlier impressions to a new table of counts; return whether no table lacks any."""
        if self._filling is None:
            if time.monotonic() - self._tables_asked < TABLES_S:
                return True
            tables = await self._shared.unfilled(position.log_id, [one.id for one in position.epochs])
            if not tables:
                self._tables_asked = time.monotonic()
                return True
            self._filling = tables[0]
        table = self._filling
        until_seq = position.seq
        if table.begun is not None and len(table.begun) == len(position.epochs):
            until_seq = next((one.seq for one in position.places(table.begun)), position.seq)
        found = await self._log.known_impressions(table.since, table.after, BATCH, until_seq)
        last = len(found) < BATCH
        await self._shared.fill(position.log_id, table, found, last=last)
        self._filling = None if last else replace(table, after=found[-1].impression_id)
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
