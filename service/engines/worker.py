"""The worker process: receives batches, drops what nobody waits for any more, computes, answers.

It ends when its pipe does, whatever it is doing, so that it never outlives the process that started it.
"""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

from models.features import Floats
from models.packs import ScoringGroup
from models.segments import Segment
from service.engines.protocol import (
    DistilJob,
    EngineUsage,
    Job,
    JobDroppedError,
    JobFailedError,
    Outcome,
    ScoreJob,
)


class WorkerModel(Protocol):
    """What computes in the worker process; a job that fails carries its error and spares the others."""

    def warm_up(self) -> None:
        """Run every path once."""
        ...

    def score(self, groups: Sequence[ScoringGroup]) -> Sequence[Floats | JobFailedError]:
        """Return each group's raw probabilities."""
        ...

    def distil(self, jobs: Sequence[Sequence[Segment]]) -> Sequence[Floats | JobFailedError]:
        """Return each job's vectors."""
        ...

    def usage(self) -> EngineUsage:
        """Return what was computed so far, and the memory in use."""
        ...

    def forget(self) -> None:
        """Drop what is kept of prompts and vectors."""
        ...


class ModelSource(Protocol):
    """A plain message that opens into a model inside the worker process."""

    def open(self) -> WorkerModel:
        """Load the model; any error says why it cannot."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """To the worker: jobs of one kind."""

    jobs: tuple[Job, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """To the worker: drop these jobs if their forward has not begun."""

    job_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Forget:
    """To the worker: drop what is kept of prompts and vectors, after the batches sent before."""


@dataclass(frozen=True, slots=True)
class Ready:
    """From the worker: loaded and warmed up."""

    usage: EngineUsage


@dataclass(frozen=True, slots=True)
class Broken:
    """From the worker: the model cannot be loaded."""

    reason: str


@dataclass(frozen=True, slots=True)
class Results:
    """From the worker: one outcome a job of a batch, and what it has used so far."""

    outcomes: tuple[tuple[int, Outcome], ...]
    usage: EngineUsage


Order = Batch | Forget


def run_worker(connection: Connection, source: ModelSource) -> None:
    """Be the worker process: load, warm up, then compute batches until the pipe ends."""
    # Ctrl-C and a service manager's SIGTERM reach the whole group; the parent drains first, and then closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    inbox = _Inbox(connection)
    try:
        model = source.open()
        model.warm_up()
    except Exception as error:  # whatever it is, the parent tells it better than a traceback here
        connection.send(Broken(" ".join(str(error).split()) or type(error).__name__))
        return
    connection.send(Ready(model.usage()))
    while True:
        order = inbox.next_order()
        if isinstance(order, Forget):
            model.forget()
        else:
            outcomes = _compute(model, order, inbox)
            connection.send(Results(outcomes, model.usage()))


class _Inbox:
    """Orders and cancellations, read by a thread of its own: a forward must delay neither."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._orders: deque[Order] = deque()
        self._cancelled: set[int] = set()
        self._arrived = threading.Condition()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def next_order(self) -> Order:
        """Wait for the next order; they come in the order in which they were sent."""
        with self._arrived:
            # Cancellations that came too late are forgotten here, or they would pile up.
            self._cancelled &= {job.id for order in self._orders if isinstance(order, Batch) for job in order.jobs}
            self._arrived.wait_for(lambda: bool(self._orders))
            return self._orders.popleft()

    def cancelled(self, job_id: int) -> bool:
        """Return whether a job was cancelled."""
        return job_id in self._cancelled

    def _read(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)  # the parent is gone; a forward that runs or hangs must not keep this process
            with self._arrived:
                if isinstance(message, Cancel):
                    self._cancelled.update(message.job_ids)
                else:
                    self._orders.append(message)
                self._arrived.notify()


def _compute(model: WorkerModel, batch: Batch, inbox: _Inbox) -> tuple[tuple[int, Outcome], ...]:
    now = time.monotonic()
    outcomes: dict[int, Outcome] = {}
    scores: list[ScoreJob] = []
    distils: list[DistilJob] = []
    for job in batch.jobs:
        if inbox.cancelled(job.id):
            outcomes[job.id] = JobDroppedError("cancelled before the forward")
        elif job.deadline <= now:
            outcomes[job.id] = JobDroppedError("past its deadline before the forward")
        elif isinstance(job, ScoreJob):
            scores.append(job)
        else:
            distils.append(job)
    if scores:
        raw = model.score([job.group for job in scores])
        outcomes.update(zip([job.id for job in scores], raw, strict=True))
    if distils:
        vectors = model.distil([job.prompts for job in distils])
        outcomes.update(zip([job.id for job in distils], vectors, strict=True))
    return tuple(outcomes.items())
