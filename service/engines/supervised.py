"""An engine in a worker process of its own: started, watched, killed when it hangs, restarted when it dies."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog

from service.engines.process import WorkerProcess
from service.engines.protocol import (
    DistilJob,
    EngineBrokenError,
    EngineError,
    EngineHealth,
    EngineState,
    EngineUnavailableError,
    Job,
    Outcome,
    ScoreJob,
)
from service.engines.worker import Batch, Broken, Cancel, ModelSource, Ready, Results


@dataclass(frozen=True)
class Supervision:
    """How long a worker may take, and how fast it is restarted. Seconds."""

    forward_limit_s: float
    load_limit_s: float
    first_backoff_s: float = 0.5  # a single crash costs little more than the load itself
    last_backoff_s: float = 30.0  # a worker that cannot stay up must not keep a core busy with loading
    steady_s: float = 60.0  # up for so long, the next crash starts from the first backoff again


class SupervisedEngine:
    """An `Engine` whose model lives in a worker process. The event loop only ever passes messages."""

    def __init__(
        self,
        source: ModelSource,
        supervision: Supervision,
        log: structlog.stdlib.BoundLogger,
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        self._source = source
        self._supervision = supervision
        self._log = log
        self._on_restart = on_restart
        self._state = EngineState.STARTING
        self._detail = "loading the model"
        self._restarts = 0
        self._worker: WorkerProcess | None = None
        self._pending: dict[int, asyncio.Future[Outcome]] = {}
        self._ready: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._hang_timer: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Begin loading and return at once."""
        self._ready = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def ready(self) -> None:
        """Return when the model is loaded and warmed up for the first time.

        Raises:
            EngineBrokenError: it never will be.
        """
        assert self._ready is not None, "start() comes first"
        await asyncio.shield(self._ready)

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Outcome]:
        """Return each group's raw probabilities."""
        return await self._submit(jobs)

    async def distil(self, jobs: Sequence[DistilJob]) -> list[Outcome]:
        """Return each job's semantic vectors."""
        return await self._submit(jobs)

    def cancel(self, job_ids: Sequence[int]) -> None:
        """Drop jobs whose forward has not begun."""
        if self._worker is not None and self._state is EngineState.READY:
            self._worker.send(Cancel(tuple(job_ids)))

    def health(self) -> EngineHealth:
        """Return where the engine stands."""
        return EngineHealth(self._state, self._detail, self._restarts)

    @property
    def worker_pid(self) -> int | None:
        """The process id of the worker that runs, if one does."""
        return self._worker.pid if self._worker is not None else None

    async def close(self) -> None:
        """Kill the worker; jobs that are not done fail."""
        self._state, self._detail = EngineState.CLOSED, "closed"
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        if self._ready is not None:
            self._ready.cancel()

    async def _submit(self, jobs: Sequence[Job]) -> list[Outcome]:
        if self._state is not EngineState.READY or self._worker is None:
            raise EngineUnavailableError(f"the engine is {self._state}: {self._detail}")
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Outcome]] = [loop.create_future() for _ in jobs]
        if not self._pending:
            self._watch_forward()
        self._pending.update(zip([job.id for job in jobs], futures, strict=True))
        self._worker.send(Batch(tuple(jobs)))
        try:
            return await asyncio.gather(*futures)
        finally:
            for job in jobs:
                self._pending.pop(job.id, None)

    async def _supervise(self) -> None:
        """Keep one worker running until closed."""
        backoff = self._supervision.first_backoff_s
        while True:
            started = time.monotonic()
            reason = await self._run_one_worker()
            if self._state is EngineState.BROKEN:
                return
            if time.monotonic() - started > self._supervision.steady_s:
                backoff = self._supervision.first_backoff_s
            self._restarts += 1
            self._on_restart()
            self._log.error("engine_lost", reason=reason, restart_in_s=backoff, restarts=self._restarts)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, self._supervision.last_backoff_s)

    async def _run_one_worker(self) -> str:
        """Run a worker from its start to its end; return why it ended."""
        started = time.monotonic()
        try:
            self._worker = worker = await WorkerProcess.start(self._source)
        except OSError as error:  # no process, memory or file handle to be had just now
            reason = f"the worker could not be started: {error}"
            self._state, self._detail = EngineState.RESTARTING, reason
            return reason
        try:
            try:
                async with asyncio.timeout(self._supervision.load_limit_s):
                    message = await worker.next_message()
            except TimeoutError:
                reason = f"the model was not loaded within {self._supervision.load_limit_s:g} s"
            else:
                if isinstance(message, Ready):
                    reason = await self._serve(worker, time.monotonic() - started)
                elif isinstance(message, Broken):
                    reason = message.reason
                    self._break_if_never_ready(reason)
                else:
                    reason = "the worker died while it loaded the model"
        finally:
            self._worker = None
            self._lost()
            await worker.kill()
        if self._state is not EngineState.BROKEN:
            self._state, self._detail = EngineState.RESTARTING, reason
        return reason

    async def _serve(self, worker: WorkerProcess, load_s: float) -> str:
        self._state, self._detail = EngineState.READY, "ready"
        self._log.info("engine_ready", load_s=round(load_s, 2), worker_pid=worker.pid, restarts=self._restarts)
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)
        while (message := await worker.next_message()) is not None:
            if isinstance(message, Results):
                self._watch_forward()
                for job_id, outcome in message.outcomes:
                    future = self._pending.pop(job_id, None)
                    if future is not None and not future.done():
                        future.set_result(outcome)
                if not self._pending:
                    self._stop_watching()
        return worker.killed_because or "the worker process died"

    def _break_if_never_ready(self, reason: str) -> None:
        """The first load failing is final; a later one may be a disk that comes back."""
        if self._ready is not None and not self._ready.done():
            self._state, self._detail = EngineState.BROKEN, reason
            self._ready.set_exception(EngineBrokenError(reason))

    def _lost(self) -> None:
        """Fail every pending job at once: its worker will not answer."""
        self._stop_watching()
        if self._state is EngineState.READY:
            self._state, self._detail = EngineState.RESTARTING, "the worker process is gone"
        error: EngineError = EngineUnavailableError("the engine stopped while it computed this; it is being restarted")
        for future in self._pending.values():
            if not future.done():
                future.set_exception(error)
        self._pending.clear()

    def _watch_forward(self) -> None:
        """Give the batch that computes now its full time."""
        self._stop_watching()
        limit = self._supervision.forward_limit_s
        self._hang_timer = asyncio.get_running_loop().call_later(limit, self._kill_hung, limit)

    def _stop_watching(self) -> None:
        if self._hang_timer is not None:
            self._hang_timer.cancel()
            self._hang_timer = None

    def _kill_hung(self, limit: float) -> None:
        if self._worker is not None:
            self._worker.abort(f"a batch took longer than {limit:g} s")
