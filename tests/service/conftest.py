from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import pytest
import structlog
import torch
from redis.asyncio import Redis

from models.loading import Bundle
from models.scoring_model import ScoringModel
from service.app import create_app
from service.bundles.change import BundleChanges
from service.bundles.handle import handle_of, open_parts
from service.bundles.loaded import LoadedModels
from service.bundles.registry import Bundles
from service.bundles.shadow import Shadow
from service.collaborators import Collaborators
from service.engines.protocol import Engine
from service.features.choice import Stores
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


def collaborators(bundle: Bundle, engine: Engine, *later: Engine, **settings: object) -> Collaborators:
    """The application's collaborators around any engine, with the bundle's own tables.

    `later` are the engines of models that are loaded afterwards.
    """
    chosen = Settings(bundle=bundle.folder, **settings)  # type: ignore[arg-type]
    metrics, log, engines = Metrics(), structlog.get_logger(), iter((engine, *later))
    stores = Stores.of(chosen, metrics.store, log)
    quality = LiveQuality(ServedScores(chosen.quality_scores, chosen.quality_age_s), metrics.quality)
    models = LoadedModels(chosen, metrics, log, lambda *_, **__: next(engines))
    parts = open_parts(bundle)
    model = models.open(parts)
    bundles = Bundles(handle_of(parts, model.engine, model.batcher, stores), metrics)
    recorder = open_recorder(chosen, metrics, log, stores.interactions(chosen.retention_days * DAY_S))
    recorder.register(bundles.current.counts)
    changes = BundleChanges(chosen, bundles, models, stores, recorder, metrics, log)
    shadow = Shadow(bundles, metrics, log, idle=lambda: models.idle, seed=0)
    return Collaborators(chosen, bundles, changes, shadow, metrics, log, recorder, quality, stores)


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
