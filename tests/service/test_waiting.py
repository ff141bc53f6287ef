import asyncio

import pytest

from service.engines.protocol import ScoreJob
from tests.service.echo import EchoEngine
from tests.service.queueing import Queue, group, turns

pytestmark = pytest.mark.anyio


async def test_a_list_counts_its_user_segment_once(echo: EchoEngine) -> None:
    echo.gate.clear()
    queue = Queue(echo)
    running = queue.score(group())
    await turns()
    long = queue.score(group(40, trunk=50))
    await turns()
    assert queue.gauge == 50 + 40 * 5
    echo.gate.set()
    await asyncio.gather(running, long)
    assert queue.gauge == 0


async def test_the_shortest_request_goes_first(echo: EchoEngine) -> None:
    echo.gate.clear()
    queue = Queue(echo)
    queue.measured(seconds_a_token=1e-3)
    requests = [queue.score(group())]
    await turns()
    requests += [queue.score(group(size, seed=size)) for size in (40, 17, 18)]
    await turns()
    echo.gate.set()
    await asyncio.gather(*requests)
    sizes = [sum(len(job.group.pack.branches) for job in batch if isinstance(job, ScoreJob)) for batch in echo.batches]
    assert sizes == [1, 17, 18, 18, 18, 4]


async def test_a_long_request_is_not_overtaken_forever(echo: EchoEngine) -> None:
    queue = Queue(echo)
    queue.measured(seconds_a_token=1e-5)
    echo.gate.clear()
    running = queue.score(group(18))
    await turns()
    long = queue.score(group(60))
    await asyncio.sleep(0.05)  # far longer than it may be overtaken
    short = [queue.score(group(18, seed=seed)) for seed in range(3)]
    await turns()
    echo.gate.set()
    await asyncio.gather(running, long, *short)
    orders = [job.id for batch in echo.batches for job in batch]
    assert orders == sorted(orders)


async def test_requests_of_one_user_share_a_batch_and_its_trunk(echo: EchoEngine) -> None:
    echo.gate.clear()
    queue = Queue(echo)
    requests = [queue.score(group(seed=9))]
    await turns()
    mine, other = group(4, trunk=60, seed=1), group(4, trunk=60, seed=2)
    requests += [queue.score(one) for one in (mine, other, mine)]
    await turns()
    echo.gate.set()
    await asyncio.gather(*requests)
    users = [[float(job.group.user_1C[0, 0]) for job in batch if isinstance(job, ScoreJob)] for batch in echo.batches]
    assert users[1:] == [[float(mine.user_1C[0, 0])] * 2, [float(other.user_1C[0, 0])]]
