"""The supervised engine with a real worker process in which everything goes wrong in turn."""

import asyncio
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog

from models.segments import Segment
from service.engines.lifecycle import Supervision
from service.engines.process import WorkerProcess
from service.engines.protocol import (
    BundlePlace,
    DistilJob,
    EngineBrokenError,
    EngineState,
    EngineUnavailableError,
    JobDroppedError,
    JobFailedError,
    ScoreJob,
)
from service.engines.supervised import SupervisedEngine
from tests.service.queueing import group
from tests.service.worker_models import ANSWER, DIE, FAIL, HANG, SLEEP, ObedientSource

pytestmark = pytest.mark.anyio

NUMBERS = itertools.count(1000)
LIMITS = Supervision(forward_limit_s=2.0, load_limit_s=60.0, first_backoff_s=0.05)


def job(number: int, order: int = ANSWER, *, within_s: float = 60.0) -> DistilJob:
    return DistilJob(number, time.monotonic() + within_s, (Segment((order,)),))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until_ready(engine: SupervisedEngine) -> None:
    async with asyncio.timeout(60):
        while not engine.health().ready:
            await asyncio.sleep(0.02)


@pytest.fixture
async def engine() -> AsyncIterator[SupervisedEngine]:
    engine = SupervisedEngine(ObedientSource(), LIMITS, structlog.get_logger())
    with pytest.raises(EngineUnavailableError, match="starting"):
        await engine.distil([job(0)])
    await engine.start()
    await engine.ready()
    yield engine
    pid = engine.worker_pid
    await engine.close()
    assert pid is None or not alive(pid)
    with pytest.raises(EngineUnavailableError):
        await engine.distil([job(99)])


async def test_a_worker_answers_drops_dies_hangs_and_comes_back(engine: SupervisedEngine) -> None:
    # One failing job spares its neighbours.
    good, bad, other = await engine.distil([job(1), job(2, FAIL), job(3)])
    assert isinstance(bad, JobFailedError)
    assert not isinstance(good, Exception) and not isinstance(other, Exception)

    # Cancelled and expired jobs are dropped before their forward: only four jobs were ever computed.
    slow = asyncio.create_task(engine.distil([job(4, SLEEP)]))
    behind = asyncio.create_task(engine.distil([job(5), job(6, within_s=0.1), job(7)]))
    await asyncio.sleep(0.05)
    engine.cancel([5])
    await slow
    dropped, late, kept = await behind
    assert isinstance(dropped, JobDroppedError) and isinstance(late, JobDroppedError)
    assert not isinstance(kept, Exception) and kept[0][0] == 5

    # A service manager's SIGTERM to the whole group is the parent's affair.
    pid = engine.worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
    [answer] = await engine.distil([job(8)])
    assert not isinstance(answer, Exception)

    # Death fails what is pending at once, and a new worker comes.
    with pytest.raises(EngineUnavailableError):
        await engine.distil([job(9, DIE), job(10)])
    assert engine.health().state is EngineState.RESTARTING
    with pytest.raises(EngineUnavailableError):
        await engine.distil([job(11)])
    await until_ready(engine)
    assert engine.health().restarts == 1
    [answer] = await engine.distil([job(12)])
    assert not isinstance(answer, Exception) and answer[0][0] == 1

    # A hang is killed at its limit, not before.
    hung = engine.worker_pid
    started = time.monotonic()
    with pytest.raises(EngineUnavailableError):
        await engine.distil([job(13, HANG)])
    assert 1.8 < time.monotonic() - started < 10
    async with asyncio.timeout(10):
        while engine.health().restarts < 2:
            await asyncio.sleep(0.02)
    assert "longer than 2 s" in engine.health().detail
    assert hung is not None and not alive(hung)


async def test_a_bundle_is_attached_refused_detached_and_kept_over_a_restart(engine: SupervisedEngine) -> None:
    async def has(bundle_id: str) -> bool:
        [outcome] = await engine.score([ScoreJob(next(NUMBERS), time.monotonic() + 60, group(), bundle_id)])
        assert not isinstance(outcome, Exception)
        return bool(outcome[0])

    for name in ("one", "two"):
        await engine.attach(BundlePlace(Path(name), name))
    with pytest.raises(EngineBrokenError, match="told to refuse"):
        await engine.attach(BundlePlace(Path("broken"), "three"))
    assert [await has(name) for name in ("one", "two", "three")] == [True, True, False]
    engine.detach("one")
    assert [await has(name) for name in ("one", "two")] == [False, True]
    with pytest.raises(EngineUnavailableError):
        await engine.distil([job(next(NUMBERS), DIE)])
    with pytest.raises(EngineUnavailableError):
        await engine.attach(BundlePlace(Path("four"), "four"))
    await until_ready(engine)
    assert [await has(name) for name in ("one", "two", "three", "four")] == [False, True, False, False]


async def test_a_bundle_that_was_detached_while_another_one_was_refused_does_not_come_back(
    engine: SupervisedEngine,
) -> None:
    await engine.attach(BundlePlace(Path("one"), "one"))
    attaching = asyncio.create_task(engine.attach(BundlePlace(Path("broken"), "two")))
    await asyncio.sleep(0)
    engine.detach("one")
    with pytest.raises(EngineBrokenError, match="told to refuse"):
        await attaching
    with pytest.raises(EngineUnavailableError):
        await engine.distil([job(next(NUMBERS), DIE)])
    await until_ready(engine)
    [outcome] = await engine.score([ScoreJob(next(NUMBERS), time.monotonic() + 60, group(), "one")])
    assert not isinstance(outcome, Exception) and not outcome[0]


async def test_a_model_that_cannot_load_is_told_once_and_not_tried_again() -> None:
    engine = SupervisedEngine(ObedientSource(error="backbone\nis missing"), LIMITS, structlog.get_logger())
    await engine.start()
    with pytest.raises(EngineBrokenError, match=r"^backbone is missing$"):
        await engine.ready()
    assert engine.health().state is EngineState.BROKEN
    assert engine.health().restarts == 0
    await engine.close()


async def test_closing_while_the_worker_starts_leaves_nothing() -> None:
    engine = SupervisedEngine(ObedientSource(), LIMITS, structlog.get_logger())
    await engine.start()
    await asyncio.sleep(0.2)
    pid = engine.worker_pid
    await engine.close()
    assert pid is None or not alive(pid)


async def test_a_worker_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    start, refusals = WorkerProcess.start, [OSError(11, "no process to be had")]

    async def sometimes(source: ObedientSource, *, gently: bool) -> WorkerProcess:
        if refusals:
            raise refusals.pop()
        return await start(source, gently=gently)

    monkeypatch.setattr(WorkerProcess, "start", sometimes)
    engine = SupervisedEngine(ObedientSource(), LIMITS, structlog.get_logger())
    await engine.start()
    await until_ready(engine)
    assert engine.health().restarts == 1
    await engine.close()


async def test_a_message_that_cannot_be_sent_fails_its_job_and_hangs_nobody() -> None:
    engine = SupervisedEngine(ObedientSource(), LIMITS, structlog.get_logger())
    await engine.start()
    await engine.ready()
    unsendable = DistilJob(1, time.monotonic() + 60, (lambda: None,))  # type: ignore[arg-type]
    async with asyncio.timeout(30):
        with pytest.raises(EngineUnavailableError):
            await engine.distil([unsendable])
    await until_ready(engine)
    await engine.close()
