"""Arrivals: open loop, where requests come whether or not earlier ones were answered, and closed loop."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loadtests.records import NO_ANSWER, Answer, Record
from loadtests.workload import Ask

Send = Callable[[Ask], Awaitable[Answer]]

MOST_REQUESTS = 1_000_000  # of one run: what was asked for by mistake ends with a message, not with the machine


def poisson(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Return the arrival times of a Poisson process of exactly `rate * seconds` arrivals, in seconds after the start.

    Their number is fixed, so that what is offered is what was asked for; given it, a Poisson process is uniform.

    Raises:
        ValueError: more arrivals than one run may have.
    """
    if rate <= 0 or seconds <= 0:
        raise ValueError(f"a rate of {rate:g} for {seconds:g} seconds: both must be over 0")
    if rate * seconds > MOST_REQUESTS:
        raise ValueError(f"{rate:g} a second for {seconds:g} seconds: one run has at most {MOST_REQUESTS} requests")
    rng = np.random.default_rng(seed)
    times: list[float] = np.sort(rng.uniform(0, seconds, max(1, round(rate * seconds)))).tolist()
    return times


@dataclass(frozen=True)
class OpenLoop:
    """Sends each request at its time. Nothing that the service does moves the schedule: no coordinated omission."""

    send: Send
    asks: Sequence[Ask]  # gone through again and again
    grace_s: float = 10.0  # how long after the last arrival an answer is waited for

    async def run(self, schedule: Sequence[float]) -> list[Record]:
        """Send at the scheduled seconds after now; return a record for each, in the schedule's order."""
        start = time.monotonic()
        tasks: list[asyncio.Task[Record]] = []
        try:
            for due, ask in zip(schedule, itertools.cycle(self.asks), strict=False):
                await asyncio.sleep(max(0.0, start + due - time.monotonic()))
                tasks.append(asyncio.create_task(self._one(ask, due, start)))
            if tasks:
                await asyncio.wait(tasks, timeout=self.grace_s)
        finally:
            for task in tasks:
                task.cancel()
        return list(await asyncio.gather(*tasks))

    async def _one(self, ask: Ask, due: float, start: float) -> Record:
        sent = time.monotonic() - start
        try:
            answer = await self.send(ask)
        except asyncio.CancelledError:
            answer = Answer(NO_ANSWER)  # the grace is over; the record says so
        return Record(due, sent, time.monotonic() - start, answer, ask.candidates)


@dataclass(frozen=True)
class ClosedLoop:
    """So many callers, each sending its next request when it has its answer."""

    send: Send
    asks: Sequence[Ask]
    callers: int = 1

    async def run(self, seconds: float, most: int = MOST_REQUESTS) -> list[Record]:
        """Go on for `seconds` or `most` requests; those under way at the end are awaited and belong to it."""
        start = time.monotonic()
        numbers = iter(range(most))
        records: list[Record] = []

        async def caller() -> None:
            for number in numbers:
                began = time.monotonic() - start
                if began >= seconds:
                    return
                ask = self.asks[number % len(self.asks)]
                answer = await self.send(ask)
                records.append(Record(began, began, time.monotonic() - start, answer, ask.candidates))

        await asyncio.gather(*(caller() for _ in range(self.callers)))
        return records
