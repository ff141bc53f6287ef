import asyncio

import pytest

from service.engines.silence import Silence

pytestmark = pytest.mark.anyio

LIMIT_S = 0.2


async def test_an_engine_that_never_answers_is_found_out_by_jobs_that_give_up() -> None:
    hangs: list[str] = []
    silence = Silence(LIMIT_S, hangs.append)
    for _ in range(8):
        silence.began()
        await asyncio.sleep(LIMIT_S / 4)
        silence.ended(answered=False)
    assert hangs[0] == "no answer within 0.2 s"


async def test_any_answer_shows_life() -> None:
    hangs: list[str] = []
    silence = Silence(LIMIT_S, hangs.append)
    silence.began()  # waits all the time
    for _ in range(8):
        silence.began()
        await asyncio.sleep(LIMIT_S / 4)
        silence.ended(answered=True)
    assert not hangs
    await asyncio.sleep(LIMIT_S * 2)
    assert len(hangs) == 1


async def test_time_in_which_nobody_waits_does_not_count() -> None:
    hangs: list[str] = []
    silence = Silence(LIMIT_S, hangs.append)
    for _ in range(2):
        silence.began()
        silence.ended(answered=False)
        await asyncio.sleep(LIMIT_S * 2)
    assert not hangs
