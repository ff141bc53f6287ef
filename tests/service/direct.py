"""An engine that computes with the real model, in this process."""

from collections.abc import Sequence

from service.engines.packed import PackedModel
from service.engines.protocol import BundlePlace, DistilJob, EngineHealth, EngineState, EngineUsage, Outcome, ScoreJob


class DirectEngine:
    """An `Engine` around a `PackedModel`."""

    def __init__(self, model: PackedModel) -> None:
        self._model = model

    async def start(self) -> None: ...

    async def ready(self) -> None: ...

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Outcome]:
        return list(self._model.score([job.group for job in jobs], [job.bundle_id for job in jobs]))

    async def distil(self, jobs: Sequence[DistilJob]) -> list[Outcome]:
        return list(self._model.distil([job.prompts for job in jobs]))

    def cancel(self, job_ids: Sequence[int]) -> None: ...

    def health(self) -> EngineHealth:
        return EngineHealth(EngineState.READY, "direct")

    async def attach(self, place: BundlePlace) -> None:
        self._model.attach(place)

    def detach(self, bundle_id: str) -> None:
        self._model.detach(bundle_id)

    def usage(self) -> EngineUsage:
        return self._model.usage()

    def forget(self) -> None:
        self._model.forget()

    async def close(self) -> None: ...
