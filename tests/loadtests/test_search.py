"""The search finds a capacity that is known: that of a queue with one server, computed and not waited for."""

from collections.abc import Sequence

import pytest

from loadtests.arrivals import poisson
from loadtests.records import Answer, Record, Summary, summarize
from loadtests.search import Search

pytestmark = pytest.mark.anyio


def queue(schedule: Sequence[float], service_s: float) -> list[Record]:
    """One server that takes requests in order and each for the same time."""
    free = 0.0
    records = []
    for due in schedule:
        free = max(free, due) + service_s
        records.append(Record(due, due, free, Answer(200)))
    return records


@pytest.mark.parametrize("first_rate", [1.0, 30.0, 500.0])
@pytest.mark.parametrize("capacity", [5.0, 40.0, 90.0])
async def test_the_capacity_of_a_known_queue_is_found(first_rate: float, capacity: float) -> None:
    async def measure(rate: float) -> Summary:
        # Evenly spaced, such a queue is stable up to exactly its capacity; a long run shows what lies above it.
        schedule = [number / rate for number in range(5000)]
        return summarize(queue(schedule, 1 / capacity), 5000 / rate, limit_s=1.5 / capacity)

    found = await Search(first_rate, precision=0.05, most_steps=40).highest(measure)
    assert found.bracketed and capacity / 1.05 <= found.rate <= capacity * 1.001
    assert all(summary.holds is (rate <= capacity * 1.001) for rate, summary in found.steps)


async def test_random_arrivals_hold_less_than_even_ones() -> None:
    async def measure(rate: float) -> Summary:
        return summarize(queue(poisson(rate, 5000 / rate), 0.01), 5000 / rate, limit_s=0.05)

    found = await Search(10, precision=0.02, most_steps=40).highest(measure)
    # M/D/1, P(wait > t) ~ exp(-theta t) with rho (e^theta - 1) = theta: 1 % wait over four services at rho = 0.57.
    assert 50 < found.rate < 65


async def test_a_search_without_an_answer_ends() -> None:
    def always(status: int) -> Summary:
        return summarize([Record(0, 0, 0.1, Answer(status))], 1, 0.5)

    async def never(rate: float) -> Summary:
        return always(429)

    async def ever(rate: float) -> Summary:
        return always(200)

    found = await Search(8, most_steps=3).highest(never)
    assert (found.rate, [rate for rate, _ in found.steps]) == (0, [8, 4, 2])
    found = await Search(8, most_steps=3).highest(ever)
    assert (found.rate, found.bracketed, [rate for rate, _ in found.steps]) == (32, False, [8, 16, 32])
