"""The resident memory of a service and its worker over time."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import psutil

MIB = 2**20
SHORTEST_S = 30.0


@dataclass
class MemorySamples:
    """Resident bytes of the server process and of its children (the worker) at seconds after the start."""

    seconds: list[float] = field(default_factory=list)
    server: list[int] = field(default_factory=list)
    worker: list[int] = field(default_factory=list)


@contextmanager
def watched_memory(pid: int, every_s: float = 1.0) -> Iterator[MemorySamples]:
    """Sample a process and its children while the block runs, in a thread: the load must not wait for it."""
    samples = MemorySamples()
    over = threading.Event()
    start = time.monotonic()

    def watch() -> None:
        process = psutil.Process(pid)
        while True:
            samples.seconds.append(time.monotonic() - start)
            samples.server.append(_resident(process))
            samples.worker.append(sum(map(_resident, _children(process))))
            if over.wait(every_s):
                return

    thread = threading.Thread(target=watch, name="memory")
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:  # a worker that was lost just now
        return 0


def slope_mib_a_minute(seconds: Sequence[float], resident: Sequence[int]) -> float | None:
    """Return the least-squares slope of the second half: the first may still fill caches.

    None if that half is shorter than half a minute, in which one allocation would look like a leak.
    """
    half = len(seconds) // 2
    if not seconds or seconds[-1] - seconds[half] < SHORTEST_S:
        return None
    slope = np.polyfit(np.asarray(seconds[half:]), np.asarray(resident[half:], np.float64) / MIB, 1)[0]
    return float(slope) * 60
