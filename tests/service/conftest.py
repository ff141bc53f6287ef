from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import pytest
import structlog
import torch
from redis.asyncio import Redis

from models.loading import Bundle
from models.scoring_model import ScoringModel
from service.app import create_app
from service.batcher import Batcher, BatchLimits
from service.collaborators import Collaborators
from service.current import BundleHandle, CurrentBundle
from service.engines.protocol import Engine
from service.features.choice import Stores, open_store
from service.features.client import open_client
from service.interactions.recorder import open_recorder
from service.metrics.registry import Metrics
from service.quality.live import LiveQuality
from service.quality.served import ServedScores
from service.settings import DAY_S, Settings
from tests.redis_server import RedisServer, redis_server
from tests.service.echo import EchoEngine

torch.set_num_threads(1)

Serve = Callable[..., httpx.AsyncClient]


@pytest.fixture(scope="session")
def model(bundle: Bundle) -> ScoringModel:
    return bundle.model()


def collaborators(bundle: Bundle, engine: Engine, **settings: object) -> Collaborators:
    """The application's collaborators around any engine, with the bundle's own tables."""
    chosen = Settings(bundle=bundle.folder, **settings)  # type: ignore[arg-type]
    metrics, log = Metrics(), structlog.get_logger()
    stores = Stores.of(chosen, metrics.store, log)
    metrics.loaded(bundle.id, bundle.manifest.reference)
    quality = LiveQuality(ServedScores(chosen.quality_scores, chosen.quality_age_s), metrics.quality)
    tables = bundle.tables()
    limits = BatchLimits(
        chosen.queue_tokens, chosen.batch_tokens, chosen.batch_ahead_ms / 1000, chosen.batches_in_flight
    )
    handle = BundleHandle(
        bundle_id=bundle.id,
        tables=tables,
        store=open_store(bundle.id, tables, stores),
        assembler=bundle.assembler(bundle.encoder(), tables),
        calibration=bundle.calibration(),
        engine=engine,
        batcher=Batcher(engine, limits, on_queue=metrics.queued, on_batch=metrics.batched),
    )
    recorder = open_recorder(chosen, metrics, log, stores.interactions(chosen.retention_days * DAY_S))
    return Collaborators(chosen, CurrentBundle(handle), metrics, log, recorder, quality, stores)


def client_of(service: Collaborators) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(service))
    return httpx.AsyncClient(transport=transport, base_url="http://sella")


@pytest.fixture(scope="session")
def running_redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def redis(running_redis: RedisServer) -> RedisServer:
    """The session's Redis, empty."""
    with running_redis.client() as client:
        client.flushall()
        client.script_flush()
    return running_redis


@pytest.fixture
async def redis_client(redis: RedisServer) -> AsyncIterator[Redis]:
    client = open_client(redis.url, 5.0)
    yield client
    await client.aclose()


@pytest.fixture
def echo() -> EchoEngine:
    return EchoEngine()


@pytest.fixture
def service(bundle: Bundle, echo: EchoEngine) -> Collaborators:
    return collaborators(bundle, echo)


@pytest.fixture
async def client(service: Collaborators) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(service) as client:
        yield client
