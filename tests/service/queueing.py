"""A batcher with its gauge, and small groups for it."""

import asyncio
import time
from typing import Any

import numpy as np

from models.packs import Branch, Pack, ScoringGroup
from models.segments import Segment
from service.batcher import Batcher, BatchLimits
from tests.service.echo import EchoEngine

LIMITS = BatchLimits(queue_tokens=1000, batch_tokens=100, ahead_s=0.0, in_flight=1)


def group(candidates: int = 1, *, trunk: int = 10, own: int = 5, seed: int = 0) -> ScoringGroup:
    rng = np.random.default_rng(seed)
    branches = tuple(Branch(trunk, Segment((1,) * own)) for _ in range(candidates))
    return ScoringGroup(
        Pack(Segment((0,) * trunk), branches),
        rng.normal(size=(1, 4)).astype(np.float32),
        rng.normal(size=(candidates, 4)).astype(np.float32),
        rng.normal(size=(candidates, 6)).astype(np.float32),
    )


def later(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


class Queue:
    """A batcher with its gauge."""

    def __init__(self, engine: EchoEngine, limits: BatchLimits = LIMITS) -> None:
        self.gauge = 0
        self.batcher = Batcher(engine, limits, on_queue=self._count)

    def measured(self, seconds_a_token: float) -> None:
        for tokens in (50, 100, 150):
            self.batcher._pace.record(tokens, tokens * seconds_a_token)

    def _count(self, tokens: int) -> None:
        self.gauge += tokens

    def score(self, *groups: ScoringGroup, deadline: float | None = None) -> asyncio.Task[Any]:
        return asyncio.create_task(self.batcher.score(groups, deadline or later()))


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)
