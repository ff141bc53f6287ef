"""What goes wrong with vLLM stays with the job it concerns, or ends in a restart."""

import asyncio
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest

from models.assembly import Assembler
from models.features import Tables
from models.fusion import probabilities
from models.packs import Branch, Pack, ScoringGroup
from models.scoring_model import ScoringModel
from models.segments import Segment
from service.engines.protocol import EngineState, EngineUnavailableError, JobDroppedError, JobFailedError, ScoreJob
from service.engines.vllm import VllmEngine
from tests.models.test_scoring_model import group_for, reference
from tests.service.test_supervised import alive

pytestmark = pytest.mark.anyio


def job(number: int, group: ScoringGroup, within_s: float = 120) -> ScoreJob:
    return ScoreJob(number, time.monotonic() + within_s, group)


@pytest.fixture(scope="module")
def group(assembler: Assembler, tables: Tables) -> ScoringGroup:
    return group_for(assembler, tables, "u1", [f"i{row}" for row in range(12)])


@pytest.fixture(scope="module")
def expected(model: ScoringModel, group: ScoringGroup) -> list[float]:
    return reference(model, group)


async def test_a_bad_job_fails_alone(engine: VllmEngine, group: ScoringGroup, expected: list[float]) -> None:
    long = Segment(group.pack.trunk.token_ids * 20)
    bad = [
        replace(group, user_1C=group.user_1C * np.float32("nan")),
        replace(group, item_KC=group.item_KC[:, :-1]),
        replace(group, semantic_KD=group.semantic_KD[:, :-1]),
        replace(group, pack=Pack(long, tuple(Branch(len(long), one.segment) for one in group.pack.branches))),
        replace(group, pack=Pack(Segment((10**6,)), tuple(replace(one, attach=1) for one in group.pack.branches))),
    ]
    first, *failed, last = await engine.score([job(n, one) for n, one in enumerate([group, *bad, group])])
    for outcome in failed:
        assert isinstance(outcome, JobFailedError), outcome
    for outcome in (first, last):
        assert not isinstance(outcome, Exception), outcome
        np.testing.assert_allclose(probabilities(np.asarray(outcome)), expected, atol=1e-5)


async def test_late_and_cancelled_jobs_are_dropped(
    engine: VllmEngine, group: ScoringGroup, expected: list[float]
) -> None:
    fresh = replace(group, user_1C=group.user_1C + np.float32(1))
    asked = asyncio.create_task(engine.score([job(1, fresh), job(2, group), job(3, group, within_s=-1)]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    engine.cancel([1, 99])
    cancelled, kept, late = await asked
    assert isinstance(cancelled, JobDroppedError) and isinstance(late, JobDroppedError)
    assert not isinstance(kept, Exception)
    np.testing.assert_allclose(probabilities(np.asarray(kept)), expected, atol=1e-5)


async def test_a_lost_core_is_replaced_and_a_hung_one_killed(
    engine: VllmEngine, group: ScoringGroup, expected: list[float]
) -> None:
    assert engine.core is not None
    [dead] = engine.core.pids
    os.kill(dead, signal.SIGTERM)  # a service manager's, to the whole group: the server drains, and kills vLLM itself
    os.kill(dead, signal.SIGINT)
    await ask(engine, group, expected)
    os.kill(dead, signal.SIGKILL)
    [outcome] = await engine.score([job(2, group)])
    assert isinstance(outcome, EngineUnavailableError)
    async with asyncio.timeout(10):
        while engine.health().state is not EngineState.RESTARTING:
            await asyncio.sleep(0.02)
    with pytest.raises(EngineUnavailableError, match="restarting"):
        await engine.score([job(3, group)])
    async with asyncio.timeout(240):
        while not engine.health().ready:
            await asyncio.sleep(0.1)
    assert engine.health().restarts == 1
    await ask(engine, group, expected)

    assert engine.core is not None
    [hung] = engine.core.pids
    assert hung != dead
    family = [hung, *(process.pid for process in psutil.Process(hung).children(recursive=True))]
    for pid in family:
        os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    [outcome] = await engine.score([job(5, group)])
    assert isinstance(outcome, EngineUnavailableError)
    assert time.monotonic() - started > 9
    async with asyncio.timeout(30):
        while engine.health().restarts < 2:
            await asyncio.sleep(0.02)
    assert "no answer within 10 s" in engine.health().detail
    async with asyncio.timeout(20):  # a killed process is gone when its parent has looked
        while any(alive(pid) for pid in family):
            await asyncio.sleep(0.05)

    # Closed while it restarts, it leaves nothing and takes nothing.
    await engine.close()
    await engine.close()
    assert engine.health().state is EngineState.CLOSED
    assert not multiprocessing.active_children()
    with pytest.raises(EngineUnavailableError, match="closed"):
        await engine.score([job(6, group)])


async def ask(engine: VllmEngine, group: ScoringGroup, expected: list[float]) -> None:
    [outcome] = await engine.score([job(1, group)])
    assert not isinstance(outcome, Exception), outcome
    np.testing.assert_allclose(probabilities(np.asarray(outcome)), expected, atol=1e-5)
