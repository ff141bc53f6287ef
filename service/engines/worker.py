"""The worker process: receives batches, drops what nobody waits for any more, computes, answers.

It ends when its pipe does, whatever it is doing, so that it never outlives the process that started it.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

from models.features import Floats
from models.packs import ScoringGroup
from models.segments import Segment
from service.collector import freeze_tables
from service.engines.protocol import (
    BundlePlace,
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

    def begin(self) -> None:
        """Called once in the thread that will compute, which is not the one that loaded."""
        ...

    def score(self, groups: Sequence[ScoringGroup], bundle_ids: Sequence[str]) -> Sequence[Floats | JobFailedError]:
        """Return each group's logits, with the projections of each one's bundle."""
        ...

    def distil(self, jobs: Sequence[Sequence[Segment]]) -> Sequence[Floats | JobFailedError]:
        """Return each job's vectors."""
        ...

    def attach(self, place: BundlePlace) -> Callable[[], None]:
        """Load another bundle's projections, in a thread beside `score`; return what then has it served.

        Any error of either says why it cannot be.
        """
        ...

    def detach(self, bundle_id: str) -> None:
        """Free a bundle's projections."""
        ...

    def usage(self) -> EngineUsage:
        """Return what was computed so far, and the memory in use."""
        ...

    def forget(self) -> None:
        """Drop what is kept of prompts and vectors."""
        ...


class ModelSource(Protocol):
    """A plain message that opens into a model inside the worker process."""

    def open(self, *, gently: bool = False) -> WorkerModel:
        """Load the model; any error says why it cannot. `gently`: others compute on the same cores."""
        ...

    def with_place(self, place: BundlePlace) -> "ModelSource":
        """Return the source with one bundle more, whose merged weights are the same."""
        ...

    def without(self, bundle_id: str) -> "ModelSource":
        """Return the source with one bundle less."""
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
class Attach:
    """To the worker: load a bundle's projections beside those there are."""

    place: BundlePlace


@dataclass(frozen=True, slots=True)
class Detach:
    """To the worker: free a bundle's projections, after the batches sent before."""

    bundle_id: str


@dataclass(frozen=True, slots=True)
class Attached:
    """From the worker: a bundle's projections are there, or why they are not."""

    bundle_id: str
    error: str = ""


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


@dataclass(frozen=True, slots=True)
class Loaded:
    """Within the worker: a bundle's projections are read, and `serve` has them served; or why they are not."""

    place: BundlePlace
    serve: Callable[[], None] | None
    error: str = ""


Order = Batch | Attach | Loaded | Detach | Forget


def serve(connection: Connection, model: WorkerModel, inbox: "Inbox") -> None:
    """Carry out orders one after the other until the pipe ends. No other thread changes what the model serves."""
    model.begin()
    attaching: dict[str, BundlePlace] = {}
    freeze_tables()
    outbox = _Outbox(connection)
    outbox.send(Ready(model.usage()))
    while True:
        match inbox.next_order():
            case Batch() as batch:
                outcomes = _compute(model, batch, inbox)
                outbox.send(Results(outcomes, model.usage()))
            case Attach(place):
                attaching[place.bundle_id] = place
                # Beside the batches: projections of a large model take a moment to read and to hash.
                threading.Thread(target=_load, args=(model, place, inbox), name="attach", daemon=True).start()
            case Loaded(place) as loaded:
                if attaching.get(place.bundle_id) is place:  # else it was given up meanwhile
                    del attaching[place.bundle_id]
                    outbox.send(_served(loaded))
            case Detach(bundle_id):
                attaching.pop(bundle_id, None)
                model.detach(bundle_id)
            case Forget():
                model.forget()


def _load(model: WorkerModel, place: BundlePlace, inbox: "Inbox") -> None:
    try:
        inbox.put(Loaded(place, model.attach(place)))
    except Exception as error:
        inbox.put(Loaded(place, None, _told(error)))


def _served(loaded: Loaded) -> Attached:
    """Have a bundle served; return what the parent is told."""
    error = loaded.error
    if loaded.serve is not None:
        try:
            loaded.serve()
        except Exception as refused:
            error = _told(refused)
    return Attached(loaded.place.bundle_id, error)


def _told(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Outbox:
    """The pipe's way out, for several threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: object) -> None:
        """Send a whole message; where the parent is gone the inbox ends the process."""
        with self._lock, suppress(OSError):
            self._connection.send(message)


class Inbox:
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

    def put(self, order: Order) -> None:
        """Add an order of this process's own."""
        with self._arrived:
            self._orders.append(order)
            self._arrived.notify()

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


def _compute(model: WorkerModel, batch: Batch, inbox: Inbox) -> tuple[tuple[int, Outcome], ...]:
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
        raw = model.score([job.group for job in scores], [job.bundle_id for job in scores])
        outcomes.update(zip([job.id for job in scores], raw, strict=True))
    if distils:
        vectors = model.distil([job.prompts for job in distils])
        outcomes.update(zip([job.id for job in distils], vectors, strict=True))
    return tuple(outcomes.items())
