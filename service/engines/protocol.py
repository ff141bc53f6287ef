"""What an engine is to the rest of the service: jobs in, arrays out, all as plain messages.

Shapes: K candidates of a group, N prompts, D = d_L.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from models.features import Floats
from models.packs import ScoringGroup
from models.segments import Segment


class EngineError(Exception):
    """A job that an engine did not compute."""


class EngineUnavailableError(EngineError):
    """The engine is loading, restarting or gone; the job may succeed later."""


class JobFailedError(EngineError):
    """This job failed and its batch neighbours did not: a score that is not finite, or an error of the model."""


class JobDroppedError(EngineError):
    """The job was cancelled or past its deadline before its forward began."""


class EngineBrokenError(EngineError):
    """The engine cannot load its model, and trying again would not help; the message names what is wrong."""


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """One group to score. `deadline` is `time.monotonic()` seconds, the same clock in every process of a machine."""

    id: int
    deadline: float
    group: ScoringGroup


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
        """Return each group's raw probabilities, fp32, `(K,)`.

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

    async def close(self) -> None:
        """Stop and free everything; jobs that are not done fail."""
        ...
