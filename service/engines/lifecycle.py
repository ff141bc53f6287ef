"""From an engine's first load to its end: its state, its restarts, and who waits for it to be ready."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import structlog

from service.background import begin
from service.engines.protocol import EngineBrokenError, EngineHealth, EngineState, EngineUnavailableError


@dataclass(frozen=True)
class Supervision:
    """How long a worker may take, and how fast it is restarted. Seconds."""

    forward_limit_s: float
    load_limit_s: float
    first_backoff_s: float = 0.5  # a single crash costs little more than the load itself
    last_backoff_s: float = 30.0  # a worker that cannot stay up must not keep a core busy with loading
    steady_s: float = 60.0  # up for so long, the next crash starts from the first backoff again


class Lifecycle:
    """Where an engine stands, and the loop that keeps one run of it going until it is closed.

    A run, given by the engine, lasts from its start to its end and returns why it ended. It says here when it is ready,
    and when it never can be.
    """

    def __init__(
        self, supervision: Supervision, log: structlog.stdlib.BoundLogger, on_restart: Callable[[], None]
    ) -> None:
        self._supervision = supervision
        self._log = log
        self._on_restart = on_restart
        self._state = EngineState.STARTING
        self._detail = "loading the model"
        self._restarts = 0
        self._ready: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def serving(self) -> bool:
        """Whether a run is ready."""
        return self._state is EngineState.READY

    def health(self) -> EngineHealth:
        """Return where the engine stands."""
        return EngineHealth(self._state, self._detail, self._restarts)

    def unavailable(self) -> EngineUnavailableError:
        """Return the error of a job that comes while no run is ready."""
        return EngineUnavailableError(f"the engine is {self._state}: {self._detail}")

    def start(self, run: Callable[[], Awaitable[str]], name: str) -> None:
        """Begin the first run and return at once."""
        self._ready = asyncio.get_running_loop().create_future()
        self._task = begin(self._supervise(run), name)

    async def ready(self) -> None:
        """Return when a run has been ready for the first time.

        Raises:
            EngineBrokenError: it never will be.
        """
        assert self._ready is not None, "start() comes first"
        await asyncio.shield(self._ready)

    def became_ready(self, load_s: float, worker_pid: int | None) -> None:
        """Take note that the run serves."""
        self._state, self._detail = EngineState.READY, "ready"
        self._log.info("engine_ready", load_s=round(load_s, 2), worker_pid=worker_pid, restarts=self._restarts)
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    def lost(self, detail: str) -> None:
        """Take note at once that a run that served serves no more; its end may take a moment longer."""
        if self.serving:
            self._state, self._detail = EngineState.RESTARTING, detail

    def break_if_never_ready(self, reason: str) -> None:
        """The first load failing is final; a later one may be a disk that comes back."""
        if self._ready is not None and not self._ready.done():
            self._state, self._detail = EngineState.BROKEN, reason
            self._ready.set_exception(EngineBrokenError(reason))

    async def close(self) -> None:
        """End the run, whatever it does."""
        self._state, self._detail = EngineState.CLOSED, "closed"
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        if self._ready is not None:
            self._ready.cancel()

    async def _supervise(self, run: Callable[[], Awaitable[str]]) -> None:
        """Keep one run going until closed."""
        backoff = self._supervision.first_backoff_s
        while True:
            started = time.monotonic()
            reason = await run()
            if self._state is EngineState.BROKEN:
                return
            self._state, self._detail = EngineState.RESTARTING, reason
            if time.monotonic() - started > self._supervision.steady_s:
                backoff = self._supervision.first_backoff_s
            self._restarts += 1
            self._on_restart()
            self._log.error("engine_lost", reason=reason, restart_in_s=backoff, restarts=self._restarts)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, self._supervision.last_backoff_s)
