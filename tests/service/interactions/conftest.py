from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry

from models.loading import Bundle
from service.collaborators import Collaborators
from service.interactions.clock import Clock
from service.interactions.event import Interaction
from service.interactions.log import EventLog, LogLimits
from service.metrics.interactions import InteractionMetrics
from tests.service.conftest import client_of, collaborators
from tests.service.echo import EchoEngine

NOW = 1_750_000_000.0
DAY_S = 86_400.0
LIMITS = LogLimits(attribution_s=3600.0, retention_s=90 * DAY_S)

Open = Callable[..., EventLog]


class FakeTime:
    """A wall clock that can be set, and time that passes on both clocks."""

    def __init__(self) -> None:
        self.wall = NOW
        self.monotonic = 50.0

    def passes(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds

    def clock(self) -> Clock:
        return Clock(lambda: self.wall, lambda: self.monotonic)


def event(event_id: str, label: bool | None = True, timestamp: float = NOW, **more: object) -> Interaction:
    fields: dict[str, object] = {"user_id": "u1", "item_id": "i7", **more}
    return Interaction(event_id=event_id, label=label, timestamp=timestamp, **fields)  # type: ignore[arg-type]


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "interactions.sqlite"


@pytest.fixture
def new_log(path: Path, time: FakeTime) -> Open:
    def new(at: Path = path, clock: Clock | None = None) -> EventLog:
        return EventLog(at, LIMITS, clock or time.clock(), InteractionMetrics(CollectorRegistry()))

    return new


@pytest.fixture
async def log(new_log: Open) -> AsyncIterator[EventLog]:
    log = new_log()
    await log.start()
    yield log
    await log.close()


@pytest.fixture
async def recording(bundle: Bundle, path: Path) -> AsyncIterator[Collaborators]:
    """The application's collaborators with a log that is open."""
    service = collaborators(bundle, EchoEngine(), interactions=path)
    await service.interactions.start()
    yield service
    await service.interactions.close()


@pytest.fixture
async def client(recording: Collaborators) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(recording) as client:
        yield client
