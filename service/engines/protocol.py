"""What an engine is to the rest of the service: jobs in, arrays out, all as plain messages.

Shapes: K candidates of a group, N prompts, D = d_L.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from models.features import Floats
from models.packs import ScoringGroup
from models.segments import Segment


class EngineError(Exception):
    """A job that an engine did not compute."""


class EngineUnavailableError(EngineError):
    """The engine is loading, restarting or gone; the job may succeed later."""


class JobFailedError(EngineError):
    """This job failed and its batch neighbours did not: a logit that is not finite, or an error of the model."""


class JobDroppedError(EngineError):
    """The job was cancelled or past its deadline before its forward began."""


class EngineBrokenError(EngineError):
    """The engine cannot load its model, and trying again would not help; the message names what is wrong."""


@dataclass(frozen=True, slots=True)
class BundlePlace:
    """Where a bundle lies, which one must lie there, and a prompt of its own that an engine scores before it serves."""

    folder: Path
    bundle_id: str
    proof: ScoringGroup | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """One group to score with the projections of one bundle.

    `deadline` is `time.monotonic()` seconds, the same clock in every process of a machine.
    """

    id: int
    deadline: float
    group: ScoringGroup
    bundle_id: str = ""  # of an engine that serves several


@dataclass(frozen=True, slots=True)
class DistilJob:
    """Prompts of Fig. 3 whose last hidden states are wanted: titles of items that no table holds."""

    id: int
    deadline: float
    prompts: tuple[Segment, ...]


Job = ScoreJob | DistilJob
Outcome = Floats | EngineError


class EngineState(StrEnum):
    """Where an engine stands; only a ready one takes jobs."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    BROKEN = "broken"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """What `/readyz` tells about an engine."""

    state: EngineState
    detail: str
    restarts: int = 0

    @property
    def ready(self) -> bool:
        """Whether it takes jobs."""
        return self.state is EngineState.READY


@dataclass(frozen=True, slots=True)
class EngineUsage:
    """What an engine has computed since it was made, and the memory it takes.

    Every token of a prompt is in one of three: computed, found in the cache, or saved because prompts of one forward
    share their beginning.
    """

    forwards: int = 0
    tokens: int = 0  # of prompts to score, computed
    tokens_cached: int = 0
    tokens_saved_by_packing: int = 0
    cache_bytes: int = 0
    memory_bytes: int = 0  # in use on the device by all, or on a CPU resident in the worker
    memory_total_bytes: int = 0  # of the device, or of the machine or container
    device: str = ""  # "cpu", "cuda:0"; empty before a worker has told

    def after(self, before: "EngineUsage") -> "EngineUsage":
        """Return this usage with the counts of workers before it: counts never go back when one is restarted."""
        return replace(
            self,
            forwards=before.forwards + self.forwards,
            tokens=before.tokens + self.tokens,
            tokens_cached=before.tokens_cached + self.tokens_cached,
            tokens_saved_by_packing=before.tokens_saved_by_packing + self.tokens_saved_by_packing,
        )


class Engine(Protocol):
    """Computes jobs somewhere else than on the event loop.

    Batches come from `service.batcher`, of one kind of job each. An outcome stands for each job, in order; one that
    failed is an error in its place, and its neighbours are not touched.
    """

    async def start(self) -> None:
        """Begin loading and return at once."""
        ...

    async def ready(self) -> None:
        """Return when the model is loaded and warmed up.

        Raises:
            EngineBrokenError: it never will be.
        """
        ...

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Outcome]:
        """Return log p(Yes) - log p(No) of each group's candidates, fp32, `(K,)`.

        Raises:
            EngineUnavailableError: none of them was computed.
        """
        ...

    async def distil(self, jobs: Sequence[DistilJob]) -> list[Outcome]:
        """Return each job's semantic vectors, fp32, `(N, D)`.

        Raises:
            EngineUnavailableError: none of them was computed.
        """
        ...

    def cancel(self, job_ids: Sequence[int]) -> None:
        """Drop jobs whose forward has not begun; unknown ids are ignored."""
        ...

    def health(self) -> EngineHealth:
        """Return where the engine stands."""
        ...

    async def attach(self, place: BundlePlace) -> None:
        """Serve another bundle of the same merged weights too, from now on and after every restart.

        Raises:
            EngineError: it cannot be, and those served already are not touched.
        """
        ...

    def detach(self, bundle_id: str) -> None:
        """Serve a bundle no more; its jobs are done."""
        ...

    def usage(self) -> EngineUsage:
        """Return what is last known of its work and memory."""
        ...

    def forget(self) -> None:
        """Drop everything kept of prompts and vectors, once the jobs that the engine has are computed."""
        ...

    async def close(self) -> None:
        """Stop and free everything; jobs that are not done fail."""
        ...
