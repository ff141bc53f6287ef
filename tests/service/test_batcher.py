import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.packs import Branch, Pack, ScoringGroup
from models.segments import Segment
from service.admission import QueueFullError
from service.batcher import Batcher, BatchLimits, DeadlineExceededError
from service.engines.protocol import DistilJob, EngineUnavailableError, JobFailedError, Outcome, ScoreJob
from tests.service.echo import EchoEngine, echo_scores

pytestmark = pytest.mark.anyio

LIMITS = BatchLimits(queue_tokens=1000, batch_tokens=100, ahead_s=0.0, in_flight=1)


def group(candidates: int = 1, *, trunk: int = 10, own: int = 5, seed: int = 0) -> ScoringGroup:
    rng = np.random.default_rng(seed)
    branches = tuple(Branch(trunk, Segment((1,) * own)) for _ in range(candidates))
    return ScoringGroup(
        Pack(Segment((0,) * trunk), branches),
        rng.normal(size=(1, 4)).astype(np.float32),
        rng.normal(size=(candidates, 4)).astype(np.float32),
        rng.normal(size=(candidates, 6)).astype(np.float32),
    )


def later(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


class Queue:
    """A batcher with its gauge."""

    def __init__(self, engine: EchoEngine, limits: BatchLimits = LIMITS) -> None:
        self.gauge = 0
        self.batcher = Batcher(engine, limits, on_queue=self._count)

    def measured(self, seconds_a_token: float) -> None:
        for tokens in (50, 100, 150):
            self.batcher._pace.record(tokens, tokens * seconds_a_token)

    def _count(self, tokens: int) -> None:
        self.gauge += tokens

    def score(self, *groups: ScoringGroup, deadline: float | None = None) -> asyncio.Task[Any]:
        return asyncio.create_task(self.batcher.score(groups, deadline or later()))


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_long_group_is_cut_to_batches_and_put_together_again(echo: EchoEngine) -> None:
    long = group(40)
    queue = Queue(echo)
    [scores], _ = await queue.score(long)
    np.testing.assert_array_equal(scores, echo_scores(long))
    assert len(echo.batches) == 3
    jobs = [job for batch in echo.batches for job in batch if isinstance(job, ScoreJob)]
    assert all(job.group.pack.tokens <= LIMITS.batch_tokens for job in jobs)
    assert queue.gauge == 0


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
                np.testing.assert_array_equal(got, echo_scores(one))
        for batch in engine.batches:
            tokens = sum(job.group.pack.tokens for job in batch if isinstance(job, ScoreJob))
            assert len(batch) == 1 or tokens <= 100
        assert queue.gauge == queue.batcher.waiting_tokens == 0

    asyncio.run(run())


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
    np.testing.assert_array_equal(scores, echo_scores(group(seed=3)))
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
    echo.gate.set()
    async with asyncio.timeout(1):
        await asyncio.gather(*requests)


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
    np.testing.assert_array_equal(scores, echo_scores(group()))
    await asyncio.gather(*admitted)


async def test_lists_are_not_judged_by_the_user_segments_of_single_candidates(echo: EchoEngine) -> None:
    queue = Queue(echo, BatchLimits(32_768, 2048, ahead_s=0.0, in_flight=1))
    for seed in range(3):
        await queue.score(group(1, trunk=500, own=20, seed=seed))
    echo.gate.clear()
    waiting = [queue.score(group(1, trunk=500, own=20, seed=seed)) for seed in range(2)]
    await turns()
    queue.batcher.check(1, 200, later(600))
    echo.gate.set()
    await asyncio.gather(*waiting)


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
    np.testing.assert_array_equal(scores, echo_scores(group(seed=4)))
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
