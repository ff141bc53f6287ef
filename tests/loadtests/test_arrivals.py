"""The open loop keeps its schedule whatever the service does, and nothing that waited is left out."""

import asyncio

import numpy as np
import pytest

from loadtests.arrivals import ClosedLoop, OpenLoop, poisson
from loadtests.records import NO_ANSWER, Answer
from loadtests.sender import Sender
from loadtests.workload import Ask
from tests.loadtests.slow import slow_server

pytestmark = pytest.mark.anyio

ASKS = [Ask("/rank", f"{number}".encode(), 1) for number in range(100)]


async def test_requests_are_sent_on_time_although_none_is_answered() -> None:
    async with slow_server() as slow, Sender(slow.url) as send:
        schedule = [0.005 * number for number in range(40)]
        running = asyncio.create_task(OpenLoop(send, ASKS).run(schedule))
        while len(slow.bodies) < 40:  # all forty are there before the first has its answer
            await asyncio.sleep(0.005)
        slow.gate.set()
        records = await running
    assert [record.scheduled for record in records] == schedule
    assert all(record.ok and record.scheduled <= record.sent <= record.done for record in records)
    # The first waited for the gate from its own arrival on, so it waited longest.
    assert records[0].latency_s >= schedule[-1]
    assert records[0].latency_s > records[-1].latency_s


async def test_latency_counts_from_the_scheduled_arrival_though_the_generator_was_late() -> None:
    async def send(ask: Ask) -> Answer:
        return Answer(200)

    async def block() -> None:
        # The loop stands still, as it would if the generator were short of CPU.
        await asyncio.sleep(0.02)
        loop = asyncio.get_running_loop()
        end = loop.time() + 0.2
        while loop.time() < end:
            pass

    blocking = asyncio.create_task(block())
    late, _ = await OpenLoop(send, ASKS).run([0.06, 0.25])
    await blocking
    assert late.sent - late.scheduled > 0.1
    assert late.latency_s >= late.sent - late.scheduled


async def test_what_is_never_answered_is_in_the_records() -> None:
    async with slow_server() as slow, Sender(slow.url) as send:
        records = await OpenLoop(send, ASKS, grace_s=0.05).run([0.0, 0.01])
        slow.gate.set()
    assert [record.answer.status for record in records] == [NO_ANSWER, NO_ANSWER]


async def test_an_answer_carries_status_and_the_services_own_time() -> None:
    async with slow_server() as slow, Sender(slow.url, deadline_ms=450) as send:
        slow.gate.set()
        slow.status = 429
        assert await send(ASKS[0]) == Answer(429, {"forward": 0.0015, "total": 0.00225})
        assert "x-request-timeout-ms: 450" in slow.headers[0]


async def test_a_closed_loop_never_has_more_under_way_than_callers() -> None:
    async with slow_server() as slow, Sender(slow.url) as send:
        running = asyncio.create_task(ClosedLoop(send, ASKS, callers=3).run(60, most=10))
        while len(slow.bodies) < 3:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        assert len(slow.bodies) == 3
        slow.gate.set()
        assert len(await running) == 10
    assert sorted(map(int, slow.bodies)) == list(range(10))


def test_poisson_arrivals_have_the_rate_and_no_memory() -> None:
    times = poisson(200, 50, seed=1)
    gaps = np.diff(times)
    assert len(times) == 10_000 and times == sorted(times) and times[0] >= 0 and times[-1] < 50
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # exponential: mean and deviation are equal
    assert poisson(200, 50, seed=1) == times != poisson(200, 50, seed=2)


@pytest.mark.parametrize(("rate", "seconds"), [(0, 1), (1, 0), (1e6, 3600)])
def test_a_run_without_bounds_is_refused(rate: float, seconds: float) -> None:
    with pytest.raises(ValueError, match="second"):
        poisson(rate, seconds)
