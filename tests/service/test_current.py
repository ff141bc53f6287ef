import asyncio

import pytest

from service.collaborators import Collaborators
from tests.service.echo import EchoEngine

pytestmark = pytest.mark.anyio


async def test_a_bundle_is_freed_only_when_nobody_holds_it(service: Collaborators, echo: EchoEngine) -> None:
    with service.current.take() as handle, service.current.take() as again:
        assert handle is again
        closing = asyncio.create_task(service.current.close())
        await asyncio.sleep(0.02)
        assert not closing.done() and not echo.closed
    await closing
    assert echo.closed


async def test_a_request_that_fails_lets_go(service: Collaborators, echo: EchoEngine) -> None:
    with pytest.raises(ZeroDivisionError), service.current.take():
        _ = 1 / 0
    await asyncio.wait_for(service.current.close(), 1)
