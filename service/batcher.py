"""The queue in front of an engine: admits what can be answered in time, and forgets what nobody waits for.

Shapes: K candidates of a group, N prompts, D = d_L.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from models.features import Floats
from models.packs import ScoringGroup
from models.segments import Segment, fill
from service.admission import Admission
from service.engines.protocol import (
    DistilJob,
    Engine,
    EngineError,
    EngineUnavailableError,
    Job,
    JobFailedError,
    Outcome,
    ScoreJob,
)
from service.pace import Pace
from service.waiting import Entry, Waiting, batch_tokens, distil_entry, score_entry


class DeadlineExceededError(Exception):
    """The request's deadline passed before its score was there."""


@dataclass(frozen=True)
class BatchLimits:
    """Bounds of the queue and of one batch."""

    queue_tokens: int
    batch_tokens: int
    ahead_s: float  # how long before the engine is expected to be free its next batch is sent
    in_flight: int


@dataclass(frozen=True, slots=True)
class Waited:
    """How long a request stood in the queue, and from its first dispatch to its last answer. Seconds."""

    queue_s: float
    forward_s: float


@dataclass(frozen=True, slots=True)
class BatchSize:
    """What one batch holds when it is handed to the engine."""

    kind: Literal["score", "distil"]
    tokens: int  # expected to be computed
    requests: int
    candidates: int  # titles, where they are distilled


@dataclass(eq=False, slots=True)
class _Running:
    """A batch at the engine."""

    tokens: int
    dispatched: float


class Batcher:
    """Takes jobs from requests and hands the engine batches.

    A long group is cut into parts of a batch's size, so that every forward is bounded and a short request waits for
    one of them, not for all. Nothing here runs of itself: the queue moves when a job arrives, when a batch ends, and
    shortly before one is expected to.
    """

    def __init__(
        self,
        engine: Engine,
        limits: BatchLimits,
        on_queue: Callable[[int], None] = lambda _: None,
        on_batch: Callable[[BatchSize], None] = lambda _: None,
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._on_queue = on_queue  # told every change of the waiting tokens
        self._on_batch = on_batch  # told every batch that the engine is handed
        self._ids, self._requests = itertools.count(), itertools.count()
        self._waiting = Waiting()
        self._pace = Pace()
        self._admission = Admission(self._waiting, self._pace, limits.queue_tokens, limits.batch_tokens)
        self._running: dict[asyncio.Task[bool], _Running] = {}  # in order of dispatch, which is the engine's order
        self._last_finished = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting_tokens(self) -> int:
        """Tokens in the queue, not yet with the engine."""
        return self._waiting.tokens

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing computes."""
        return not self._waiting and not self._running

    def check(self, groups: int, candidates: int, deadline: float) -> None:
        """Refuse a request that has no chance, before anything is done for it: by its size, as sizes have been lately.

        Raises:
            QueueFullError: it would be refused.
        """
        self._judge(self._admission.usual_tokens(groups, candidates), deadline)

    async def score(
        self, groups: Sequence[ScoringGroup], deadline: float, *, admitted: bool = False, bundle_id: str = ""
    ) -> tuple[list[Floats], Waited]:
        """Return each group's logits, `(K,)`; `deadline` is `time.monotonic()` seconds.

        `bundle_id` says whose projections, where the engine serves several bundles. `admitted` is for a request of
        which a part was computed already: it is refused no more.

        Raises:
            QueueFullError: refused at once.
            DeadlineExceededError: not computed in time.
            EngineError: the engine is gone, or a group failed.
        """
        parts = [list(group.parts(self._limits.batch_tokens)) for group in groups]
        entries = [
            score_entry(ScoreJob(next(self._ids), deadline, part, bundle_id), first=index == 0)
            for group_parts in parts
            for index, part in enumerate(group_parts)
        ]
        self._admission.remember(groups)
        if not admitted:
            self._judge(sum(entry.tokens for entry in entries), deadline)
        values, waited = await self._run(entries, deadline)
        computed = iter(values)
        return [np.concatenate([next(computed) for _ in group_parts]) for group_parts in parts], waited

    async def distil(
        self, prompts: Sequence[Segment], deadline: float, *, then: tuple[int, int] = (0, 0)
    ) -> tuple[Floats, Waited]:
        """Return each prompt's semantic vector, `(N, D)`; raises like `score`.

        `then` says how many groups and candidates the request will score with them: it is admitted with both or not.
        """
        chunks = fill(prompts, self._limits.batch_tokens)
        entries = [distil_entry(DistilJob(next(self._ids), deadline, chunk)) for chunk in chunks]
        later = self._admission.usual_tokens(*then)
        self._judge(sum(entry.tokens for entry in entries) + later, deadline)
        self._admission.reserved += later
        try:
            values, waited = await self._run(entries, deadline)
        finally:
            self._admission.reserved -= later
        return np.concatenate(values), waited

    def _judge(self, tokens: int, deadline: float) -> None:
        self._drop_what_ended()
        self._admission.judge(tokens, deadline, self._busy_until(time.monotonic()))

    async def _run(self, entries: Sequence[Entry], deadline: float) -> tuple[list[Floats], Waited]:
        self._enqueue(entries, deadline)
        try:
            outcomes = await asyncio.gather(*(entry.outcome for entry in entries))
        finally:
            self._leave(entries)
        for outcome in outcomes:
            if isinstance(outcome, EngineError):
                raise outcome
        now = time.monotonic()
        first = min((entry.dispatched or now for entry in entries), default=now)
        enqueued = min((entry.enqueued for entry in entries), default=now)
        return [one for one in outcomes if not isinstance(one, EngineError)], Waited(first - enqueued, now - first)

    def _enqueue(self, entries: Sequence[Entry], deadline: float) -> None:
        tokens = sum(entry.tokens for entry in entries)
        due = self._admission.due(tokens, deadline, time.monotonic())
        request = next(self._requests)
        for entry in entries:
            entry.due, entry.request = due, request
            self._waiting.add(entry)
        self._on_queue(tokens)
        self._pump()

    def _busy_until(self, now: float) -> float:
        """Return when the engine is expected to have computed what it holds."""
        until = now
        for index, one in enumerate(self._running.values()):
            began = self._began(one) if index == 0 else until
            until = max(now, began + self._admission.seconds(one.tokens))
        return until

    def _began(self, first: _Running) -> float:
        """Return when the engine began the oldest batch that it holds: it computes one after the other."""
        return max(first.dispatched, self._last_finished)

    def _leave(self, entries: Sequence[Entry]) -> None:
        """Forget a request that ended: answered, failed, cancelled or expired, wherever its jobs are."""
        at_engine = []
        for entry in entries:
            if self._waiting.remove(entry):
                self._on_queue(-entry.tokens)
            elif not entry.outcome.done() or entry.outcome.cancelled():
                at_engine.append(entry.job.id)
            entry.outcome.cancel()
        if at_engine:
            self._engine.cancel(at_engine)

    def _pump(self) -> None:
        """Hand over batches while the engine takes them."""
        while self._waiting and len(self._running) < self._limits.in_flight:
            if self._running and self._too_early():
                return
            batch = self._next_batch()
            if batch:
                self._dispatch(batch)

    def _dispatch(self, batch: Sequence[Entry]) -> None:
        now = time.monotonic()
        for entry in batch:
            entry.dispatched = now
        task = asyncio.create_task(self._compute(batch))
        size = _size(batch)
        self._running[task] = _Running(size.tokens, now)
        self._on_batch(size)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[bool]) -> None:
        now = time.monotonic()
        finished = self._running.pop(task)
        if not task.cancelled() and task.result():
            self._pace.record(finished.tokens, now - self._began(finished))
        self._last_finished = now
        self._pump()

    def _too_early(self) -> bool:
        """Whether the next batch should stay open: the engine is busy, so waiting for company costs nothing yet."""
        now = time.monotonic()
        left = self._busy_until(now) - self._limits.ahead_s - now
        if self._timer is not None:  # what was expected when it was set may have changed
            self._timer.cancel()
            self._timer = None
        if left <= 0:
            return False
        self._timer = asyncio.get_running_loop().call_later(left, self._soon_free)
        return True

    def _soon_free(self) -> None:
        self._timer = None
        self._pump()

    def _next_batch(self) -> list[Entry]:
        self._drop_what_ended()
        batch = self._waiting.batch(self._limits.batch_tokens)
        for entry in batch:
            self._take(entry)
        return batch

    def _drop_what_ended(self) -> None:
        """Take out what nobody waits for: expired entries, and those whose request ended and has not left yet."""
        now = time.monotonic()
        for entry in list(self._waiting):
            if entry.outcome.done():
                self._take(entry)
            elif entry.job.deadline <= now:
                self._take(entry)
                entry.outcome.set_exception(DeadlineExceededError("the deadline passed in the queue"))

    def _take(self, entry: Entry) -> None:
        self._waiting.remove(entry)
        self._on_queue(-entry.tokens)

    async def _compute(self, batch: Sequence[Entry]) -> bool:
        """Run one batch and give each job its outcome; return whether all of it was computed.

        No error leaves this task, or its requests would hang.
        """
        outcomes: list[Outcome] = []
        try:
            outcomes = await self._ask([entry.job for entry in batch])
        except EngineError as error:
            outcomes = [error] * len(batch)
        except Exception as error:
            outcomes = [JobFailedError(f"{type(error).__name__}: {error}")] * len(batch)
        finally:  # an engine that was cancelled, or forgot some, has failed the rest
            given = outcomes + [EngineUnavailableError("the engine gave no outcome")] * (len(batch) - len(outcomes))
            for entry, outcome in zip(batch, given, strict=False):
                if not entry.outcome.done():
                    entry.outcome.set_result(outcome)
        return len(outcomes) == len(batch) and not any(isinstance(outcome, EngineError) for outcome in outcomes)

    async def _ask(self, jobs: Sequence[Job]) -> list[Outcome]:
        if isinstance(jobs[0], ScoreJob):
            return await self._engine.score([job for job in jobs if isinstance(job, ScoreJob)])
        return await self._engine.distil([job for job in jobs if isinstance(job, DistilJob)])


def _size(batch: Sequence[Entry]) -> BatchSize:
    jobs = [entry.job for entry in batch]
    return BatchSize(
        kind="score" if isinstance(jobs[0], ScoreJob) else "distil",
        tokens=batch_tokens(batch),
        requests=len({entry.request for entry in batch}),
        candidates=sum(len(job.group.pack.branches) if isinstance(job, ScoreJob) else len(job.prompts) for job in jobs),
    )
