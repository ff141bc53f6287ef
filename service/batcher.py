"""The queue in front of an engine: bounded by tokens, refusing at once, forgetting what nobody waits for.

Shapes: K candidates of a group, N prompts, D = d_L.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from models.assembly import ScoringGroup
from models.features import Floats
from models.template import Segment
from service.engines.protocol import DistilJob, Engine, EngineError, Job, JobFailedError, Outcome, ScoreJob


class QueueFullError(Exception):
    """Refused at once: so many tokens wait already that this request would wait too long."""


class DeadlineExceededError(Exception):
    """The request's deadline passed before its score was there."""


@dataclass(frozen=True)
class BatchLimits:
    """Bounds of the queue and of one batch."""

    queue_tokens: int
    batch_tokens: int
    wait_s: float
    in_flight: int


@dataclass(frozen=True, slots=True)
class Waited:
    """How long a request stood in the queue, and from its first dispatch to its last answer. Seconds."""

    queue_s: float
    forward_s: float


@dataclass(eq=False, slots=True)
class _Entry:
    """One job in the queue or at the engine."""

    job: Job
    tokens: int
    outcome: asyncio.Future[Outcome]
    enqueued: float = field(default_factory=time.monotonic)
    dispatched: float | None = None


class Batcher:
    """Takes jobs from requests and hands the engine batches.

    A long group is cut into parts of a batch's size, so that every forward is bounded and a batch is a meaningful
    unit of time. Nothing here runs of itself: the queue moves when a job arrives, when a batch ends, and when a
    partly filled batch has waited its few milliseconds.
    """

    def __init__(self, engine: Engine, limits: BatchLimits, on_queue: Callable[[int], None] = lambda _: None) -> None:
        self._engine = engine
        self._limits = limits
        self._on_queue = on_queue  # told every change of the waiting tokens
        self._ids = itertools.count()
        self._waiting: dict[int, _Entry] = {}  # in order of arrival; keyed, so that leaving costs nothing
        self._waiting_tokens = 0
        self._running: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting_tokens(self) -> int:
        """Tokens in the queue, not yet with the engine."""
        return self._waiting_tokens

    async def score(self, groups: Sequence[ScoringGroup], deadline: float) -> tuple[list[Floats], Waited]:
        """Return each group's raw probabilities, `(K,)`; `deadline` is `time.monotonic()` seconds.

        Raises:
            QueueFullError: refused at once.
            DeadlineExceededError: not computed in time.
            EngineError: the engine is gone, or a group failed.
        """
        parts = [list(group.parts(self._limits.batch_tokens)) for group in groups]
        entries = [
            self._entry(ScoreJob(next(self._ids), deadline, part), part.pack.tokens)
            for group_parts in parts
            for part in group_parts
        ]
        values, waited = await self._run(entries)
        computed = iter(values)
        return [np.concatenate([next(computed) for _ in group_parts]) for group_parts in parts], waited

    async def distil(self, prompts: Sequence[Segment], deadline: float) -> tuple[Floats, Waited]:
        """Return each prompt's semantic vector, `(N, D)`; raises like `score`."""
        entries = [
            self._entry(DistilJob(next(self._ids), deadline, chunk), sum(map(len, chunk)))
            for chunk in _chunks(prompts, self._limits.batch_tokens)
        ]
        values, waited = await self._run(entries)
        return np.concatenate(values), waited

    def _entry(self, job: Job, tokens: int) -> _Entry:
        return _Entry(job, tokens, asyncio.get_running_loop().create_future())

    async def _run(self, entries: Sequence[_Entry]) -> tuple[list[Floats], Waited]:
        self._admit(entries)
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

    def _admit(self, entries: Sequence[_Entry]) -> None:
        """Take all of a request's jobs or none. An empty queue takes any one request, or the largest never ran."""
        tokens = sum(entry.tokens for entry in entries)
        if self._waiting and self._waiting_tokens + tokens > self._limits.queue_tokens:
            raise QueueFullError(
                f"{self._waiting_tokens} tokens wait and {tokens} more exceed {self._limits.queue_tokens}"
            )
        self._waiting.update((entry.job.id, entry) for entry in entries)
        self._count(tokens)
        self._pump()

    def _leave(self, entries: Sequence[_Entry]) -> None:
        """Forget a request that ended: answered, failed, cancelled or expired, wherever its jobs are."""
        at_engine = []
        for entry in entries:
            if self._waiting.pop(entry.job.id, None) is not None:
                self._count(-entry.tokens)
            elif not entry.outcome.done() or entry.outcome.cancelled():
                at_engine.append(entry.job.id)
            entry.outcome.cancel()
        if at_engine:
            self._engine.cancel(at_engine)

    def _count(self, tokens: int) -> None:
        self._waiting_tokens += tokens
        self._on_queue(tokens)

    def _pump(self) -> None:
        """Hand over batches while the engine takes them."""
        while self._waiting and len(self._running) < self._limits.in_flight:
            if self._running and self._wait_for_company():
                return
            batch = self._next_batch()
            if batch:
                task = asyncio.create_task(self._compute(batch))
                self._running.add(task)
                task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._pump()

    def _wait_for_company(self) -> bool:
        """Whether a batch that is not full should wait: the engine is busy, so waiting costs nothing yet."""
        oldest = next(iter(self._waiting.values()))
        left = oldest.enqueued + self._limits.wait_s - time.monotonic()
        if self._waiting_tokens >= self._limits.batch_tokens or left <= 0:
            return False
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(left, self._waited_enough)
        return True

    def _waited_enough(self) -> None:
        self._timer = None
        self._pump()

    def _next_batch(self) -> list[_Entry]:
        """Take the oldest job and those of its kind that fit beside it."""
        now = time.monotonic()
        batch: list[_Entry] = []
        tokens = 0
        for entry in list(self._waiting.values()):
            if entry.outcome.done():  # its request ended, and has not come round to leaving yet
                self._take(entry)
            elif entry.job.deadline <= now:
                self._take(entry)
                entry.outcome.set_exception(DeadlineExceededError("the deadline passed in the queue"))
            elif not batch or (
                type(entry.job) is type(batch[0].job) and tokens + entry.tokens <= self._limits.batch_tokens
            ):
                self._take(entry)
                entry.dispatched = now
                batch.append(entry)
                tokens += entry.tokens
            if tokens >= self._limits.batch_tokens:
                break
        return batch

    def _take(self, entry: _Entry) -> None:
        del self._waiting[entry.job.id]
        self._count(-entry.tokens)

    async def _compute(self, batch: Sequence[_Entry]) -> None:
        """Run one batch and give each job its outcome; no error leaves this task, or its requests would hang."""
        jobs = [entry.job for entry in batch]
        try:
            if isinstance(jobs[0], ScoreJob):
                outcomes = await self._engine.score([job for job in jobs if isinstance(job, ScoreJob)])
            else:
                outcomes = await self._engine.distil([job for job in jobs if isinstance(job, DistilJob)])
        except EngineError as error:
            outcomes = [error] * len(batch)
        except Exception as error:
            outcomes = [JobFailedError(f"{type(error).__name__}: {error}")] * len(batch)
        for entry, outcome in zip(batch, outcomes, strict=True):
            if not entry.outcome.done():
                entry.outcome.set_result(outcome)


def _chunks(prompts: Sequence[Segment], max_tokens: int) -> Iterator[tuple[Segment, ...]]:
    chunk: list[Segment] = []
    tokens = 0
    for prompt in prompts:
        if chunk and tokens + len(prompt) > max_tokens:
            yield tuple(chunk)
            chunk, tokens = [], 0
        chunk.append(prompt)
        tokens += len(prompt)
    if chunk:
        yield tuple(chunk)
