"""A second bundle that scores a share of the requests too, after they were answered; only the difference is kept."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import structlog

from service.background import begin
from service.bundles.handle import BundleHandle
from service.bundles.registry import Bundles, Role
from service.metrics.registry import Metrics
from service.questions import Question
from service.scoring import Answer

CANDIDATES = (
    20  # of a request: what a shadow computes fits in one batch, so none of it ever waits before a live request
)
PATIENCE_S = 10.0  # of one request's; a shadow that hangs must not hold its bundle for ever

Rescore = Callable[[BundleHandle, float], Awaitable[tuple[list[Answer], object]]]


def sample(questions: Sequence[Question]) -> list[Question]:
    """Return what a shadow scores of a request: the first candidates of its first question."""
    return [replace(one, candidates=one.candidates[:CANDIDATES]) for one in questions[:1]]


class Shadow:
    """Scores one request at a time, and only begins while nobody waits for an engine: what comes otherwise is dropped.

    A live request that comes while the shadow's forward runs on the same engine waits for that one batch at most.
    """

    def __init__(
        self,
        bundles: Bundles,
        metrics: Metrics,
        log: structlog.stdlib.BoundLogger,
        idle: Callable[[], bool],
        seed: int | None = None,
    ) -> None:
        self._bundles = bundles
        self._metrics = metrics
        self._log = log
        self._idle = idle
        self._random = random.Random(seed)
        self._task: asyncio.Task[None] | None = None

    def offer(self, answers: Sequence[Answer], rescore: Rescore) -> None:
        """Score an answered request again, if there is a shadow and the request is drawn."""
        seat = self._bundles.roles.get(Role.SHADOW)
        if seat is None or self._random.random() >= self._bundles.share(Role.SHADOW):
            return
        if (self._task is not None and not self._task.done()) or not self._idle():
            self._metrics.bundles.shadow_dropped()
            return
        self._task = begin(self._score(answers, rescore), "shadow", vital=False)

    async def close(self) -> None:
        """Give up what is being scored."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _score(self, answers: Sequence[Answer], rescore: Rescore) -> None:
        await asyncio.sleep(0)  # the answer goes out first
        with self._bundles.take_shadow() as handle:
            if handle is None:
                return
            try:
                async with asyncio.timeout(PATIENCE_S):
                    again, _ = await rescore(handle, time.monotonic() + PATIENCE_S)
            except Exception as error:  # nobody asked for it: whatever happens here reaches no client
                self._metrics.bundles.shadow_dropped()
                self._log.debug("shadow_failed", reason=f"{type(error).__name__}: {error}")
                return
            self._metrics.bundles.shadow_scored(handle.bundle_id, _differences(answers, again))


def _differences(answers: Sequence[Answer], again: Sequence[Answer]) -> list[float]:
    """Return the distance of each score that both gave; `again` holds the first ones."""
    return [
        abs(one.score - other.score)
        for answer, second in zip(answers, again, strict=False)
        for one, other in zip(answer.items, second.items, strict=False)
        if one is not None and other is not None
    ]
