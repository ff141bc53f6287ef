"""Models for the worker process that do what their job's first token says."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from models.features import Floats
from models.packs import ScoringGroup
from models.segments import Segment
from service.engines.protocol import BundlePlace, EngineUsage, JobFailedError

ANSWER, SLEEP, DIE, HANG, FAIL = range(5)


@dataclass(frozen=True)
class ObedientSource:
    """Opens an `ObedientModel`; with `error`, does not."""

    error: str = ""
    places: tuple[BundlePlace, ...] = ()

    def with_place(self, place: BundlePlace) -> "ObedientSource":
        return replace(self, places=(*self.without(place.bundle_id).places, place))

    def without(self, bundle_id: str) -> "ObedientSource":
        return replace(self, places=tuple(one for one in self.places if one.bundle_id != bundle_id))

    def open(self, *, gently: bool = False) -> "ObedientModel":
        if self.error:
            raise ValueError(self.error)
        return ObedientModel([place.bundle_id for place in self.places])


class ObedientModel:
    """Distils to its process id and the number of jobs it has computed."""

    def __init__(self, bundle_ids: Sequence[str] = ()) -> None:
        self._computed = 0
        self._attached = set(bundle_ids)

    def begin(self) -> None: ...

    def attach(self, place: BundlePlace) -> Callable[[], None]:
        if place.folder.name == "broken":
            raise ValueError("told to refuse")
        return lambda: self._attached.add(place.bundle_id)

    def detach(self, bundle_id: str) -> None:
        self._attached.discard(bundle_id)

    def warm_up(self) -> None: ...

    def score(self, groups: Sequence[ScoringGroup], bundle_ids: Sequence[str]) -> list[Floats | JobFailedError]:
        """1 where the bundle is attached, else 0."""
        return [
            np.full(len(group.pack.branches), one in self._attached, np.float32)
            for group, one in zip(groups, bundle_ids, strict=True)
        ]

    def distil(self, jobs: Sequence[Sequence[Segment]]) -> list[Floats | JobFailedError]:
        return [self._obey(job[0].token_ids[0]) for job in jobs]

    def usage(self) -> EngineUsage:
        return EngineUsage(forwards=self._computed, memory_bytes=os.getpid(), device="cpu")

    def forget(self) -> None:
        self._computed += 1000  # seen by the next answer

    def _obey(self, order: int) -> Floats | JobFailedError:
        self._computed += 1
        if order == SLEEP:
            time.sleep(0.5)
        if order == DIE:
            os._exit(9)
        if order == HANG:
            time.sleep(600)
        if order == FAIL:
            return JobFailedError("told to fail")
        return np.array([[self._computed, os.getpid()]], np.float32)
