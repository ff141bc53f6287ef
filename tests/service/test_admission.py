import asyncio

import numpy as np
import pytest

from models.segments import Segment
from service.admission import QueueFullError
from service.batcher import BatchLimits
from tests.service.echo import EchoEngine, echo_logits
from tests.service.queueing import Queue, group, later, turns

pytestmark = pytest.mark.anyio


async def test_a_full_queue_refuses_at_once_and_admits_again_later(echo: EchoEngine) -> None:
    echo.gate.clear()
    queue = Queue(echo)
    running = queue.score(group(18))
    await turns()
    waiting = [queue.score(group(18)) for _ in range(10)]
    await turns()
    assert queue.gauge == 1000
    with pytest.raises(QueueFullError):
        await queue.score(group())
    echo.gate.set()
    await asyncio.gather(running, *waiting)
    await queue.score(group())
    assert queue.gauge == 0


async def test_an_empty_queue_takes_a_request_over_its_bound(echo: EchoEngine) -> None:
    [scores], _ = await Queue(echo).score(group(300))
    assert len(scores) == 300


async def test_a_request_that_would_be_late_is_refused_at_once(echo: EchoEngine) -> None:
    echo.gate.clear()
    queue = Queue(echo)
    queue.measured(seconds_a_token=0.1)  # a group of 15 tokens takes 1.5 s
    admitted = [queue.score(group(seed=seed)) for seed in range(3)]
    await turns()
    with pytest.raises(QueueFullError, match="late") as refusal:
        await queue.score(group(30), deadline=later(8.0))
    assert refusal.value.retry_after_s == 15  # 1.5 s at the engine, 3 s waiting, 16 s of its own; 80 % of 8 s left
    admitted.append(queue.score(group(), deadline=later(10.0)))
    await turns()
    echo.gate.set()
    await asyncio.gather(*admitted)
    assert queue.gauge == 0


async def test_a_busy_engine_refuses_what_it_cannot_do_in_time_though_nothing_waits(echo: EchoEngine) -> None:
    echo.gate.clear()
    queue = Queue(echo)
    queue.measured(seconds_a_token=0.1)
    running = queue.score(group())
    await turns()
    with pytest.raises(QueueFullError):
        await queue.score(group(), deadline=later(2.0))
    echo.gate.set()
    await running
    await queue.score(group(40), deadline=later(2.0))  # alone, and far longer than its deadline by the pace so far


async def test_a_request_without_a_chance_is_refused_before_anything_is_done_for_it(echo: EchoEngine) -> None:
    echo.gate.clear()
    queue = Queue(echo)
    queue.measured(seconds_a_token=0.1)
    queue.batcher.check(1, 1000, later(0.1))  # nothing waits or runs
    admitted = [queue.score(group(seed=seed)) for seed in range(3)]
    await turns()
    queue.batcher.check(1, 10, later(100.0))
    with pytest.raises(QueueFullError):
        queue.batcher.check(1, 10, later(3.0))
    echo.gate.set()
    await asyncio.gather(*admitted)


async def test_a_request_that_was_partly_computed_is_not_refused(echo: EchoEngine) -> None:
    echo.gate.clear()
    queue = Queue(echo)
    queue.measured(seconds_a_token=0.1)
    admitted = [queue.score(group(seed=seed)) for seed in range(3)]
    await turns()
    again = asyncio.create_task(queue.batcher.score([group()], later(4.0), admitted=True))
    await turns()
    echo.gate.set()
    [scores], _ = await again
    np.testing.assert_array_equal(scores, echo_logits(group()))
    await asyncio.gather(*admitted)


async def test_lists_are_not_judged_by_the_user_segments_of_single_candidates(echo: EchoEngine) -> None:
    queue = Queue(echo, BatchLimits(32_768, 2048, ahead_s=0.0, in_flight=1))
    for seed in range(3):
        await queue.score(group(1, trunk=500, own=20, seed=seed))
    echo.gate.clear()
    waiting = [queue.score(group(1, trunk=500, own=20, seed=seed)) for seed in range(2)]
    await turns()
    queue.batcher.check(1, 200, later(600))
    asked = queue.score(group(200, trunk=500, own=20))
    await turns()
    assert queue.gauge == 520 + 500 + 200 * 20
    echo.gate.set()
    await asyncio.gather(*waiting, asked)


async def test_titles_are_admitted_with_the_list_that_follows_them_or_not_at_all(echo: EchoEngine) -> None:
    queue = Queue(echo)
    await queue.score(group(10))  # candidates are of five tokens, behind ten
    echo.gate.clear()
    running = queue.score(group())
    await turns()
    titles = [asyncio.create_task(queue.batcher.distil([Segment((1,) * 5)], later(), then=(1, 90))) for _ in range(2)]
    await turns()
    with pytest.raises(QueueFullError):
        await queue.batcher.distil([Segment((1,) * 5)], later(), then=(1, 90))
    echo.gate.set()
    await asyncio.gather(running, *titles)
    await queue.batcher.distil([Segment((1,) * 5)], later(), then=(1, 90))


async def test_nothing_is_admitted_that_makes_an_admitted_request_late(echo: EchoEngine) -> None:
    echo.gate.clear()
    queue = Queue(echo)
    queue.measured(seconds_a_token=0.1)
    first = queue.score(group())
    await turns()
    long = queue.score(group(18), deadline=later(16.0))  # 1.5 s of the first, 10 s of its own
    await turns()
    with pytest.raises(QueueFullError):
        await queue.score(group(seed=2))  # shorter, so it would go first
    echo.gate.set()
    await asyncio.gather(first, long)
