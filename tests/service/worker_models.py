"""Models for the worker process that do what their job's first token says."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.features import Floats
from models.packs import ScoringGroup
from models.segments import Segment
from service.engines.protocol import EngineUsage, JobFailedError

ANSWER, SLEEP, DIE, HANG, FAIL = range(5)


@dataclass(frozen=True)
class ObedientSource:
    """Opens an `ObedientModel`; with `error`, does not."""

    error: str = ""

    def open(self) -> "ObedientModel":
        if self.error:
            raise ValueError(self.error)
        return ObedientModel()


class ObedientModel:
    """Distils to its process id and the number of jobs it has computed."""

    def __init__(self) -> None:
        self._computed = 0

    def warm_up(self) -> None: ...

    def score(self, groups: Sequence[ScoringGroup]) -> list[Floats | JobFailedError]:
        return [np.zeros(len(group.pack.branches), np.float32) for group in groups]

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
