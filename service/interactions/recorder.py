"""Interactions from end to end: taken into the log, told to listeners, passed on to the shared store, swept."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

import structlog

from service.background import begin
from service.interactions.clock import Clock
from service.interactions.counts import LiveCounts
from service.interactions.event import Interaction
from service.interactions.ledger import EventConflictError, Resolved, Taken
from service.interactions.live import Ends, LiveUser, nothing_stored
from service.interactions.log import EventLog, LogLimits
from service.interactions.replay import Replay
from service.interactions.shared import SharedInteractions
from service.interactions.writer import LogHealth, LogUnavailableError
from service.metrics.registry import Metrics
from service.settings import DAY_S, Settings

OnOutcome = Callable[[Interaction, bool], None]

SWEEP_S = 1.0  # how late an expiry may be, and how often a lost log is tried again at least
# How long an acknowledgement waits for the shared store, so that other servers' next score knows of it, too.
SHARED_S = 0.05


CANCEL_S = 0.5  # after which a task that goes on is cancelled again


def _unheard(_: Interaction, __: bool) -> None:
    pass


class Recorder:
    """Takes interactions and deletions, and tells what they say of a user.

    `on_outcome` is called once for each impression that becomes negative or positive, and once more where a negative
    becomes positive, on the event loop. It must not raise, nor wait. `on_deleted` is told of each user who is deleted,
    here or at another server.
    """

    def __init__(
        self,
        log: EventLog,
        clock: Clock,
        limits: LogLimits,
        metrics: Metrics,
        events: structlog.stdlib.BoundLogger,
        shared: SharedInteractions | None = None,
        on_outcome: OnOutcome = _unheard,
        *,
        needs_deletions: bool = True,
    ) -> None:
        self.clock = clock
        self.limits = limits
        self.on_outcome = on_outcome
        self.on_deleted: Callable[[str], None] = lambda _: None
        self._log = log
        self._needs_deletions = needs_deletions
        self._metrics = metrics.interactions
        self._events = events
        self._replay = None if shared is None else Replay(log, shared, metrics.interactions, events, self._forgotten)
        self._tasks: list[asyncio.Task[None]] = []
        self._up: bool | None = None

    async def start(self) -> None:
        """Open the log, if that can be done now, and begin what goes on beside the requests."""
        await self._log.start()
        self._tell_health()
        self._tasks.append(begin(self._sweep(), "attribution sweep"))
        if self._replay is not None:
            self._tasks.append(begin(self._replay.run(), "replay"))

    async def close(self) -> None:
        """Stop, and close the log; what it has is on disk."""
        for task in self._tasks:
            while not task.done():
                # Before Python 3.12 `asyncio.wait_for` loses a cancellation that comes as its future ends.
                task.cancel()
                await asyncio.wait([task], timeout=CANCEL_S)
            with suppress(asyncio.CancelledError):
                await task
        self._tasks.clear()
        await self._log.close()

    def register(self, counts: LiveCounts) -> None:
        """Keep a bundle's live counts up to date; they are filled when the log opens, or within a second of now."""
        self._log.register(counts)

    async def count(self, counts: LiveCounts) -> None:
        """Keep a bundle's live counts up to date from now on, and fill them if the log can be read now."""
        self._log.register(counts)
        await self._log.fill_counts()

    def uncount(self, counts: LiveCounts) -> None:
        """Stop updating a bundle's live counts."""
        self._log.unregister(counts)

    async def record(self, batch: Sequence[Interaction]) -> Taken:
        """Take a batch, all of it or nothing; it is on disk when this returns.

        Raises:
            EventConflictError: an event id is in the log with other content.
            LogUnansweredError: the disk does not answer; the batch may be taken later.
            LogUnavailableError: the log cannot be written now.
        """
        try:
            taken = await self._log.append(batch, late=self._taken)
        except (EventConflictError, LogUnavailableError):
            self.refuse(len(batch))
            raise
        self._taken(taken)
        await self._pass_on(taken.seq)
        return taken

    def _taken(self, taken: Taken) -> None:
        self._metrics.taken(taken.verdicts)
        self._tell(taken.resolved)

    def refuse(self, interactions: int) -> None:
        """Count interactions that were refused for what they say."""
        self._metrics.refused(interactions)

    async def delete(self, user_id: str) -> float:
        """Forget a user, on disk too, and return as of when, UTC seconds.

        Raises:
            LogUnansweredError: the disk does not answer; the user may be deleted later.
            LogUnavailableError: the log cannot be written now.
        """

        def deleted() -> None:
            self._metrics.deleted()
            self.on_deleted(user_id)
            self._events.info("user_deleted")

        deleted_at, seq = await self._log.delete(user_id, late=deleted)
        deleted()
        await self._pass_on(seq)
        return deleted_at

    async def live(self, user_ids: Iterable[str], ends: Ends = nothing_stored) -> Mapping[str, LiveUser]:
        """Return what the log knows of users; those that it knows nothing of are missing.

        `ends` tells when the bundle's stored history of a user ends: older likes than the newest ones count after it.
        """
        return await self._log.live(user_ids, ends)

    def deletions_known(self) -> bool:
        """Return whether the deletions at other servers are known, as far as they were once told; alone there are none.

        A log that was begun while the shared store was away knows of none: a bundle may hold users who were deleted.
        """
        return self._replay is None or not self._needs_deletions or self._log.deletions_known

    def _forgotten(self, user_id: str) -> None:
        self.on_deleted(user_id)

    def health(self) -> LogHealth:
        """Return whether interactions are taken."""
        return self._log.health()

    async def _sweep(self) -> None:
        pause_s = SWEEP_S
        while True:
            await asyncio.sleep(pause_s)
            began = time.monotonic()
            resolved = await self._log.sweep()
            # Where there is more to do, half of the disk's time stays for interactions.
            pause_s = time.monotonic() - began if self._log.behind else SWEEP_S
            self._tell(resolved)
            await self._log.fill_counts()
            self._tell_health()
            if self._replay is not None and resolved:
                self._replay.wake()

    def _tell(self, resolved: Iterable[Resolved]) -> None:
        for one in resolved:
            self.on_outcome(one.interaction, one.positive)

    def _tell_health(self) -> None:
        health = self._log.health()
        if health.ready != self._up:
            self._up = health.ready
            if health.ready:
                self._events.info("log_available", detail=health.detail)
            else:
                self._events.error("log_unavailable", detail=health.detail)

    async def _pass_on(self, seq: int) -> None:
        if self._replay is not None:
            await self._replay.caught_up(seq, SHARED_S)


def open_recorder(
    settings: Settings,
    metrics: Metrics,
    events: structlog.stdlib.BoundLogger,
    shared: SharedInteractions | None = None,
    on_outcome: OnOutcome = _unheard,
    clock: Clock | None = None,
) -> Recorder:
    """Return the recorder that the settings describe; its log is opened when it is started."""
    clock = clock or Clock()
    limits = LogLimits(settings.attribution_s, settings.retention_days * DAY_S)
    log = EventLog(settings.interactions_file, limits, clock, metrics.interactions)
    needs = settings.require_deletions
    return Recorder(log, clock, limits, metrics, events, shared, on_outcome, needs_deletions=needs)
