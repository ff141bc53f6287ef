"""An engine in a worker process of its own: started, watched, killed when it hangs, restarted when it dies."""

import asyncio
import time
from collections.abc import Callable, Sequence

import structlog

from service.engines.lifecycle import Lifecycle, Supervision
from service.engines.process import WorkerProcess
from service.engines.protocol import (
    BundlePlace,
    DistilJob,
    EngineBrokenError,
    EngineError,
    EngineHealth,
    EngineUnavailableError,
    EngineUsage,
    Job,
    Outcome,
    ScoreJob,
)
from service.engines.worker import Attach, Attached, Batch, Broken, Cancel, Detach, Forget, ModelSource, Ready, Results


class SupervisedEngine:
    """An `Engine` whose model lives in a worker process. The event loop only ever passes messages."""

    def __init__(
        self,
        source: ModelSource,
        supervision: Supervision,
        log: structlog.stdlib.BoundLogger,
        on_restart: Callable[[], None] = lambda: None,
        gently: Callable[[], bool] = lambda: False,
    ) -> None:
        """`gently` is asked before a worker starts whether others compute on its cores."""
        self._source = source
        self._supervision = supervision
        self._gently = gently
        self._lifecycle = Lifecycle(supervision, log, on_restart)
        self._worker: WorkerProcess | None = None
        self._attaching: dict[str, asyncio.Future[None]] = {}
        self._pending: dict[int, asyncio.Future[Outcome]] = {}
        self._hang_timer: asyncio.TimerHandle | None = None
        self._usage = EngineUsage()  # the worker's that runs
        self._usage_before = EngineUsage()  # of the workers before it

    async def start(self) -> None:
        """Begin loading and return at once."""
        self._lifecycle.start(self._run_one_worker, "engine supervisor")

    async def ready(self) -> None:
        """Return when the model is loaded and warmed up for the first time.

        Raises:
            EngineBrokenError: it never will be.
        """
        await self._lifecycle.ready()

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Outcome]:
        """Return each group's logits."""
        return await self._submit(jobs)

    async def distil(self, jobs: Sequence[DistilJob]) -> list[Outcome]:
        """Return each job's semantic vectors."""
        return await self._submit(jobs)

    def cancel(self, job_ids: Sequence[int]) -> None:
        """Drop jobs whose forward has not begun."""
        if self._worker is not None and self._lifecycle.serving:
            self._worker.send(Cancel(tuple(job_ids)))

    def health(self) -> EngineHealth:
        """Return where the engine stands."""
        return self._lifecycle.health()

    @property
    def worker_pid(self) -> int | None:
        """The process id of the worker that runs, if one does."""
        return self._worker.pid if self._worker is not None else None

    async def attach(self, place: BundlePlace) -> None:
        """Serve another bundle of the same weights too.

        Raises:
            EngineUnavailableError: the worker is not ready, or stopped meanwhile.
            EngineBrokenError: the bundle cannot be served.
        """
        if not self._lifecycle.serving or self._worker is None:
            raise self._lifecycle.unavailable()
        self._source = self._source.with_place(place)  # a worker that starts meanwhile has it too
        attached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._attaching[place.bundle_id] = attached
        self._worker.send(Attach(place))
        try:
            async with asyncio.timeout(self._supervision.load_limit_s):
                await attached
        except BaseException as error:
            self.detach(place.bundle_id)  # alone: others may have come and gone meanwhile
            if isinstance(error, TimeoutError):
                raise EngineUnavailableError("the worker did not attach the bundle in time") from error
            raise
        finally:
            self._attaching.pop(place.bundle_id, None)

    def detach(self, bundle_id: str) -> None:
        """Serve a bundle no more."""
        self._source = self._source.without(bundle_id)
        if self._worker is not None and self._lifecycle.serving:
            self._worker.send(Detach(bundle_id))

    def usage(self) -> EngineUsage:
        """Return what the workers have computed, and the memory that the last one said it takes."""
        return self._usage.after(self._usage_before)

    def forget(self) -> None:
        """Drop the worker's cached keys, values and vectors; one that starts has none."""
        if self._worker is not None and self._lifecycle.serving:
            self._worker.send(Forget())

    async def close(self) -> None:
        """Kill the worker; jobs that are not done fail."""
        await self._lifecycle.close()

    async def _submit(self, jobs: Sequence[Job]) -> list[Outcome]:
        if not self._lifecycle.serving or self._worker is None:
            raise self._lifecycle.unavailable()
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

    async def _run_one_worker(self) -> str:
        """Run a worker from its start to its end; return why it ended."""
        started = time.monotonic()
        try:
            self._worker = worker = await WorkerProcess.start(self._source, gently=self._gently())
        except OSError as error:  # no process, memory or file handle to be had just now
            return f"the worker could not be started: {error}"
        try:
            try:
                async with asyncio.timeout(self._supervision.load_limit_s):
                    message = await worker.next_message()
            except TimeoutError:
                reason = f"the model was not loaded within {self._supervision.load_limit_s:g} s"
            else:
                if isinstance(message, Ready):
                    self._usage = message.usage
                    reason = await self._serve(worker, time.monotonic() - started)
                elif isinstance(message, Broken):
                    reason = message.reason
                    self._lifecycle.break_if_never_ready(reason)
                else:
                    reason = "the worker died while it loaded the model"
        finally:
            self._worker = None
            self._usage_before, self._usage = self.usage(), EngineUsage()
            self._lost()
            await worker.kill()
        return reason

    async def _serve(self, worker: WorkerProcess, load_s: float) -> str:
        self._lifecycle.became_ready(load_s, worker.pid)
        while (message := await worker.next_message()) is not None:
            if isinstance(message, Attached):
                self._take_attached(message)
            elif isinstance(message, Results):
                self._watch_forward()
                self._usage = message.usage
                for job_id, outcome in message.outcomes:
                    future = self._pending.pop(job_id, None)
                    if future is not None and not future.done():
                        future.set_result(outcome)
                if not self._pending:
                    self._stop_watching()
        return worker.killed_because or "the worker process died"

    def _take_attached(self, message: Attached) -> None:
        future = self._attaching.get(message.bundle_id)
        if future is not None and not future.done():
            if message.error:
                future.set_exception(EngineBrokenError(message.error))
            else:
                future.set_result(None)

    def _lost(self) -> None:
        """Fail every pending job at once: its worker will not answer."""
        self._stop_watching()
        self._lifecycle.lost("the worker process is gone")
        error: EngineError = EngineUnavailableError("the engine stopped while it computed this; it is being restarted")
        for future in self._pending.values():
            if not future.done():
                future.set_exception(error)
        for attaching in self._attaching.values():
            if not attaching.done():
                attaching.set_exception(error)
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
