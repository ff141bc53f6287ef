"""The vLLM engine: scores by vLLM's asynchronous engine, titles distilled by the packed model beside it."""

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import structlog

from models.backbone import DTYPES, BackboneError
from models.bundle import BundleError
from models.features import Floats
from models.packs import ScoringGroup
from models.probe import check_logits
from service.engines.lifecycle import Lifecycle, Supervision
from service.engines.protocol import (
    BundlePlace,
    DistilJob,
    EngineBrokenError,
    EngineError,
    EngineHealth,
    EngineUnavailableError,
    EngineUsage,
    JobDroppedError,
    JobFailedError,
    Outcome,
    ScoreJob,
)
from service.engines.supervised import SupervisedEngine
from service.engines.vllm_config import CoreConfig
from service.engines.vllm_core import VllmCore
from service.engines.vllm_prompts import MixedPrompt, PromptWriter


class VllmEngine:
    """An `Engine` around vLLM. Every candidate is a prompt of its own, whose trunk vLLM finds in its prefix cache.

    vLLM does not give hidden states and answers from one engine, so `distiller` is a second one, for titles outside the
    catalogue alone. Its worker saves the merged weights that vLLM loads, and so is ready first.
    """

    def __init__(
        self,
        config: CoreConfig,
        writers: Mapping[str, PromptWriter],
        open_writer: Callable[[BundlePlace], PromptWriter],
        distiller: SupervisedEngine,
        warm_up: Sequence[MixedPrompt],
        supervision: Supervision,
        log: structlog.stdlib.BoundLogger,
        on_restart: Callable[[], None] = lambda: None,
        proofs: Mapping[str, ScoringGroup] | None = None,
    ) -> None:
        """`proofs` are prompts of bundles, by bundle id, which vLLM must score as the packed model does."""
        self._config = config
        self._proofs = dict(proofs or {})
        self._proof_ids = itertools.count(-1, -1)  # of jobs that no batcher made
        self._writers = dict(writers)  # by bundle id: projections stay on this side
        self._open_writer = open_writer
        self._distiller = distiller
        self._warm_up = warm_up
        self._supervision = supervision
        self._lifecycle = Lifecycle(supervision, log, on_restart)
        self.core: VllmCore | None = None  # the run of vLLM that starts or serves
        self._usage_before = EngineUsage()  # of the runs of vLLM before this one
        self._computing: dict[int, asyncio.Task[Floats]] = {}

    async def start(self) -> None:
        """Begin loading and return at once."""
        await self._distiller.start()
        self._lifecycle.start(self._run_one_core, "vLLM supervisor")

    async def ready(self) -> None:
        """Return when both models are loaded and warmed up for the first time.

        Raises:
            EngineBrokenError: they never will be.
        """
        await self._lifecycle.ready()

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Outcome]:
        """Return each group's logits, fp32, `(K,)`."""
        core = self._serving()
        return list(await asyncio.gather(*(self._outcome(core, job) for job in jobs)))

    async def distil(self, jobs: Sequence[DistilJob]) -> list[Outcome]:
        """Return each job's semantic vectors, fp32, `(N, D)`."""
        self._serving()
        return await self._distiller.distil(jobs)

    def cancel(self, job_ids: Sequence[int]) -> None:
        """Drop jobs; prompts that vLLM has already are aborted."""
        for job_id in job_ids:
            if job_id in self._computing:
                self._computing[job_id].cancel()
        self._distiller.cancel(job_ids)

    def health(self) -> EngineHealth:
        """Return where the engine stands. It is ready without its distiller, for ids of the catalogue need none."""
        own, beside = self._lifecycle.health(), self._distiller.health()
        detail = own.detail
        if own.ready and not beside.ready:
            detail = f"ready, but titles outside the catalogue wait: {beside.detail}"
        return EngineHealth(own.state, detail, own.restarts + beside.restarts)

    async def attach(self, place: BundlePlace) -> None:
        """Serve another bundle of the same weights too.

        Raises:
            EngineUnavailableError: an engine is not ready, or stopped meanwhile.
            EngineBrokenError: the bundle cannot be served.
        """
        self._serving()
        try:
            writer = await asyncio.to_thread(self._open_writer, place)
        except (BundleError, OSError) as error:
            raise EngineBrokenError(str(error)) from error
        await self._distiller.attach(place)  # it may have to load the weights from there one day
        self._writers[place.bundle_id] = writer
        try:
            await self._prove(self._serving(), place.bundle_id, place.proof)
        except BaseException:
            self.detach(place.bundle_id)
            raise
        if place.proof is not None:
            self._proofs[place.bundle_id] = place.proof

    def detach(self, bundle_id: str) -> None:
        """Serve a bundle no more."""
        self._writers.pop(bundle_id, None)
        self._proofs.pop(bundle_id, None)
        self._distiller.detach(bundle_id)

    def usage(self) -> EngineUsage:
        """Return what vLLM has computed. The memory is what the distiller sees: on a GPU that is everybody's."""
        core = self.core.usage() if self.core is not None else EngineUsage()
        beside = self._distiller.usage()
        return replace(
            core.after(self._usage_before),
            memory_bytes=beside.memory_bytes,
            memory_total_bytes=beside.memory_total_bytes,
            device=beside.device,
        )

    def forget(self) -> None:
        """Drop vLLM's prefix cache, and what the distiller keeps."""
        if self.core is not None and self._lifecycle.serving:
            self.core.forget()
        self._distiller.forget()

    async def close(self) -> None:
        """Kill both engines; jobs that are not done fail."""
        await self._lifecycle.close()
        await self._distiller.close()

    def _serving(self) -> VllmCore:
        if not self._lifecycle.serving or self.core is None:
            raise self._lifecycle.unavailable()
        return self.core

    async def _outcome(self, core: VllmCore, job: ScoreJob) -> Outcome:
        """Compute one job; its error is its outcome and touches no other job."""
        task = asyncio.create_task(self._compute(core, job))
        self._computing[job.id] = task
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
            self._computing.pop(job.id, None)
        if task.cancelled():
            if core is self.core:
                return JobDroppedError("cancelled")
            return EngineUnavailableError("the engine stopped while it computed this; it is being restarted")
        error = task.exception()
        if error is None:
            return task.result()
        if isinstance(error, EngineUnavailableError | JobDroppedError | JobFailedError):
            return error
        return JobFailedError(f"{type(error).__name__}: {error}")

    async def _compute(self, core: VllmCore, job: ScoreJob) -> Floats:
        _refuse_if_late(job)
        writer = self._writers.get(job.bundle_id or next(iter(self._writers)))
        if writer is None:
            raise JobFailedError(f"bundle {job.bundle_id[:12]} is not loaded")
        prompts = await asyncio.to_thread(writer.write, job.group)
        _refuse_if_late(job)
        return np.array(await core.ask(prompts), np.float32)

    async def _prove(self, core: VllmCore, bundle_id: str, proof: ScoringGroup | None) -> None:
        """Compare vLLM's logits of a bundle's prompt with those of the packed model, which are the reference's.

        Raises:
            EngineBrokenError: they differ, or one is not finite.
            EngineUnavailableError: one of the two is gone.
        """
        if proof is None:
            return
        prompts = await asyncio.to_thread(self._writers[bundle_id].write, proof)
        deadline = time.monotonic() + self._supervision.forward_limit_s
        job = ScoreJob(next(self._proof_ids), deadline, proof, bundle_id)
        [theirs] = await self._distiller.score([job])
        try:
            if isinstance(theirs, EngineError):
                raise theirs
            ours_K = np.array(await core.ask(prompts), np.float32)
            check_logits(ours_K, theirs, DTYPES[self._config.dtype])
        except (JobFailedError, JobDroppedError, BackboneError) as error:
            raise EngineBrokenError(f"bundle {bundle_id[:12]}: the prompt that proves it: {error}") from error

    async def _run_one_core(self) -> str:
        """Run vLLM from its start to its end; return why it ended."""
        try:
            await self._distiller.ready()  # at once, but for the first time: it saves the weights that vLLM loads
        except EngineBrokenError as error:
            self._lifecycle.break_if_never_ready(str(error))
            return str(error)
        started = time.monotonic()
        self.core = core = VllmCore(self._config, self._supervision.forward_limit_s)
        try:
            try:
                async with asyncio.timeout(self._supervision.load_limit_s):
                    await core.open(self._warm_up)
                    for bundle_id, proof in list(self._proofs.items()):
                        with suppress(EngineUnavailableError):  # a distiller that restarts is no fault of vLLM's
                            await self._prove(core, bundle_id, proof)
            except TimeoutError:
                reason = f"vLLM was not ready within {self._supervision.load_limit_s:g} s"
            except Exception as error:  # what vLLM raises where it cannot start is not ours to list
                message = " ".join(str(error).split()) or type(error).__name__
                reason = f"vLLM cannot start: {message} (its own log, on standard output, says more)"
                self._lifecycle.break_if_never_ready(reason)
            else:
                reason = await self._serve(core, time.monotonic() - started)
        finally:
            self._usage_before, self.core = self.usage(), None
            self._lost()
            await core.close()
        return reason

    async def _serve(self, core: VllmCore, load_s: float) -> str:
        self._lifecycle.became_ready(load_s, core.pids[0])
        await core.death()
        return core.killed_because or "vLLM's engine core died"

    def _lost(self) -> None:
        """Fail everything that computes at once: nobody will answer it."""
        self._lifecycle.lost("vLLM's engine core is gone")
        for task in self._computing.values():
            task.cancel()


def _refuse_if_late(job: ScoreJob) -> None:
    if job.deadline <= time.monotonic():
        raise JobDroppedError("past its deadline before the forward")
