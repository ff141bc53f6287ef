import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.packs import Pack
from models.segments import Segment
from service.batcher import BatchLimits, DeadlineExceededError
from service.engines.protocol import DistilJob, EngineUnavailableError, JobFailedError, Outcome, ScoreJob
from tests.service.echo import EchoEngine, echo_logits
from tests.service.queueing import LIMITS, Queue, group, later, turns

pytestmark = pytest.mark.anyio


async def test_a_long_group_is_cut_to_batches_and_put_together_again(echo: EchoEngine) -> None:
    long = group(40)
    queue = Queue(echo)
    [scores], _ = await queue.score(long)
    np.testing.assert_array_equal(scores, echo_logits(long))
    assert len(echo.batches) == 3
    jobs = [job for batch in echo.batches for job in batch if isinstance(job, ScoreJob)]
    assert all(job.group.pack.tokens <= LIMITS.batch_tokens for job in jobs)
    assert queue.gauge == 0


@pytest.mark.parametrize("trunk", [95, 100, 400])
async def test_a_batch_shorter_than_the_shared_prefix_still_takes_several_candidates(
    echo: EchoEngine, trunk: int
) -> None:
    queue = Queue(echo, BatchLimits(queue_tokens=10**6, batch_tokens=100, ahead_s=0.001, in_flight=1))
    long = group(40, trunk=trunk)
    [scores], _ = await queue.score(long)
    np.testing.assert_array_equal(scores, echo_logits(long))
    assert len(echo.batches) == 4  # of ten candidates of five tokens
    echo.batches.clear()
    alone = [
        replace(long, pack=Pack(long.pack.trunk, (one,)), item_KC=long.item_KC[:1], semantic_KD=long.semantic_KD[:1])
        for one in long.pack.branches
    ]
    echo.gate.clear()
    requests = [queue.score(one) for one in alone]
    await turns()
    echo.gate.set()
    await asyncio.gather(*requests)
    assert len(echo.batches) < 7


@given(shapes=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_every_request_gets_its_own_scores_whatever_its_neighbours(shapes: list[list[int]]) -> None:
    async def run() -> None:
        engine = EchoEngine()
        queue = Queue(engine, BatchLimits(queue_tokens=10**6, batch_tokens=100, ahead_s=0.001, in_flight=2))
        requests = [[group(size, seed=31 * i + j) for j, size in enumerate(sizes)] for i, sizes in enumerate(shapes)]
        answers = await asyncio.gather(*(queue.score(*groups) for groups in requests))
        for groups, (scores, _) in zip(requests, answers, strict=True):
            for one, got in zip(groups, scores, strict=True):
                np.testing.assert_array_equal(got, echo_logits(one))
        for batch in engine.batches:
            tokens = sum(job.group.pack.tokens for job in batch if isinstance(job, ScoreJob))
            assert len(batch) == 1 or tokens <= 100
        assert queue.gauge == queue.batcher.waiting_tokens == 0

    asyncio.run(run())


async def test_a_cancelled_request_never_reaches_the_engine(echo: EchoEngine) -> None:
    echo.gate.clear()
    queue = Queue(echo)
    first = queue.score(group(seed=1))
    await turns()
    gone, kept = queue.score(group(seed=2)), queue.score(group(seed=3))
    await turns()
    gone.cancel()
    echo.gate.set()
    await first
    [scores], _ = await kept
    np.testing.assert_array_equal(scores, echo_logits(group(seed=3)))
    assert [len(batch) for batch in echo.batches] == [1, 1]
    assert echo.cancelled == []
    assert queue.gauge == 0


async def test_a_cancelled_request_at_the_engine_is_cancelled_there(echo: EchoEngine) -> None:
    echo.gate.clear()
    queue = Queue(echo)
    gone = queue.score(group())
    await turns()
    gone.cancel()
    await turns()
    [[job]] = echo.batches
    assert echo.cancelled == [job.id]
    echo.gate.set()


async def test_an_expired_request_never_reaches_the_engine(echo: EchoEngine) -> None:
    echo.gate.clear()
    queue = Queue(echo)
    first = queue.score(group())
    await turns()
    late = queue.score(group(), deadline=later(0.01))
    await asyncio.sleep(0.02)
    echo.gate.set()
    await first
    with pytest.raises(DeadlineExceededError):
        await late
    assert len(echo.batches) == 1
    assert queue.gauge == 0


async def test_an_idle_engine_is_never_waited_for(echo: EchoEngine) -> None:
    queue = Queue(echo, BatchLimits(1000, 100, ahead_s=0.0, in_flight=2))
    queue.measured(seconds_a_token=10.0)
    _, waited = await queue.score(group())
    assert waited.queue_s < 1


async def test_a_batch_stays_open_until_the_engine_is_soon_free(echo: EchoEngine) -> None:
    echo.gate.clear()
    queue = Queue(echo, BatchLimits(1000, 100, ahead_s=0.01, in_flight=2))
    queue.measured(seconds_a_token=0.004)  # the first batch is thought to take 60 ms
    requests = [queue.score(group(seed=seed)) for seed in range(3)]
    await turns()
    assert [len(batch) for batch in echo.batches] == [1]
    await asyncio.sleep(0.2)
    assert [len(batch) for batch in echo.batches] == [1, 2]
    echo.gate.set()
    await asyncio.gather(*requests)


async def test_a_batch_that_ends_early_lets_the_next_one_go(echo: EchoEngine) -> None:
    echo.gate.clear()
    queue = Queue(echo, BatchLimits(1000, 100, ahead_s=0.0, in_flight=2))
    queue.measured(seconds_a_token=0.1)
    requests = [queue.score(group(seed=seed)) for seed in range(3)]
    await turns()
    assert [len(batch) for batch in echo.batches] == [1]
    echo.gate.set()
    async with asyncio.timeout(1):
        await asyncio.gather(*requests)
    assert [len(batch) for batch in echo.batches] == [1, 2]


@pytest.mark.parametrize("fault", ["too few", "cancelled"])
async def test_an_engine_that_forgets_a_job_hangs_nobody(
    echo: EchoEngine, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    score = echo.score

    async def forgetful(jobs: Sequence[ScoreJob]) -> list[Outcome]:
        if fault == "cancelled":
            raise asyncio.CancelledError
        return (await score(jobs))[:-1]

    monkeypatch.setattr(echo, "score", forgetful)
    queue = Queue(echo)
    for _ in range(2):
        async with asyncio.timeout(1):
            with pytest.raises(EngineUnavailableError):
                await queue.score(group())


async def test_one_failed_job_spares_its_batch_neighbours(echo: EchoEngine) -> None:
    echo.gate.clear()
    queue = Queue(echo)
    first = queue.score(group())
    await turns()
    bad, good = queue.score(group()), queue.score(group(seed=4))
    await turns()
    echo.poisoned[1] = JobFailedError("not finite")
    echo.gate.set()
    await first
    with pytest.raises(JobFailedError):
        await bad
    [scores], _ = await good
    np.testing.assert_array_equal(scores, echo_logits(group(seed=4)))
    assert [len(batch) for batch in echo.batches] == [1, 2]


@pytest.mark.parametrize(
    ("error", "seen"), [(EngineUnavailableError("gone"), EngineUnavailableError), (OSError("odd"), JobFailedError)]
)
async def test_an_engine_that_fails_fails_the_request_and_nothing_hangs(
    echo: EchoEngine, error: Exception, seen: type[Exception]
) -> None:
    echo.error = error
    queue = Queue(echo)
    for _ in range(3):
        with pytest.raises(seen):
            await queue.score(group(), group())
    assert queue.gauge == 0


async def test_titles_and_groups_never_share_a_batch(echo: EchoEngine) -> None:
    echo.gate.clear()
    queue = Queue(echo)
    first = queue.score(group())
    await turns()
    prompts = [Segment((7,) * 30) for _ in range(5)]
    distilled = asyncio.create_task(queue.batcher.distil(prompts, later()))
    second = queue.score(group())
    await turns()
    echo.gate.set()
    vectors, _ = await distilled
    await asyncio.gather(first, second)
    assert len(vectors) == 5
    assert [{type(job) for job in batch} for batch in echo.batches] == [
        {ScoreJob},
        {DistilJob},
        {DistilJob},
        {ScoreJob},
    ]
