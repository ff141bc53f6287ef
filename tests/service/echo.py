"""An engine without torch: deterministic scores, a gate to hold batches, and a record of what it was asked."""

import asyncio
from collections.abc import Sequence

import numpy as np

from models.features import Floats
from models.packs import ScoringGroup
from service.engines.protocol import (
    BundlePlace,
    DistilJob,
    EngineError,
    EngineHealth,
    EngineState,
    EngineUsage,
    Job,
    Outcome,
    ScoreJob,
)
from tests.tiny import D_MODEL


def echo_logits(group: ScoringGroup) -> Floats:
    """Logits that depend on the user and on each candidate, and on nothing else."""
    logits_K: Floats = (group.item_KC.sum(-1) + group.semantic_KD.sum(-1) / 4 + group.user_1C.sum()).astype(np.float32)
    return logits_K


class EchoEngine:
    """An `Engine` that computes at once, or when `gate` is opened."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.state = EngineState.READY
        self.batches: list[tuple[Job, ...]] = []
        self.cancelled: list[int] = []
        self.error: Exception | None = None
        self.poisoned: dict[int, EngineError] = {}  # by job id
        self.used = EngineUsage()
        self.forgotten = 0
        self.attached: list[str] = []
        self.closed = False

    async def start(self) -> None: ...

    async def ready(self) -> None: ...

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Outcome]:
        await self._take(jobs)
        return [self.poisoned.get(job.id, echo_logits(job.group)) for job in jobs]

    async def distil(self, jobs: Sequence[DistilJob]) -> list[Outcome]:
        await self._take(jobs)
        return [
            np.stack([np.resize(np.array(prompt.token_ids, np.float32) / 400, D_MODEL) for prompt in job.prompts])
            for job in jobs
        ]

    def cancel(self, job_ids: Sequence[int]) -> None:
        self.cancelled.extend(job_ids)

    def health(self) -> EngineHealth:
        return EngineHealth(self.state, "echo")

    async def attach(self, place: BundlePlace) -> None:
        self.attached.append(place.bundle_id)

    def detach(self, bundle_id: str) -> None:
        self.attached.append(f"-{bundle_id}")

    def usage(self) -> EngineUsage:
        return self.used

    def forget(self) -> None:
        self.forgotten += 1

    async def close(self) -> None:
        self.closed = True

    async def _take(self, jobs: Sequence[Job]) -> None:
        self.batches.append(tuple(jobs))
        await self.gate.wait()
        if self.error is not None:
            raise self.error
