"""A bundle in a test's Redis, and the stores over it."""

from contextlib import closing

import structlog
from redis.asyncio import Redis

from models.loading import Bundle
from service.features.cache import ItemCache
from service.features.client import open_publisher
from service.features.codec import Codec
from service.features.embedded import EmbeddedStore
from service.features.fallback import FallbackStore
from service.features.keys import Keys
from service.features.publish import Published, Publisher, PublishOptions
from service.features.redis import RedisStore
from service.metrics.registry import Metrics
from tests.redis_server import RedisServer


def publish(server: RedisServer, bundle: Bundle, *, keys: Keys = Keys(), **options: object) -> Published:  # noqa: B008
    chosen = PublishOptions(**options)  # type: ignore[arg-type]
    with closing(open_publisher(server.url)) as client:
        return Publisher(client, bundle, chosen, lambda what, done, total: None, keys).publish()


def redis_store(client: Redis, bundle: Bundle, metrics: Metrics, cache_bytes: int = 0) -> RedisStore:
    sizes = bundle.manifest.dimensions
    codec = Codec(sizes.d_collab, sizes.d_model)
    cache = ItemCache(cache_bytes, metrics.store)
    return RedisStore(client, bundle.id, codec, cache, counted_until=bundle.manifest.counted_until)


def fallback_store(client: Redis, bundle: Bundle, metrics: Metrics, limit_s: float = 5.0) -> FallbackStore:
    embedded = EmbeddedStore(bundle.id, bundle.tables())
    store = redis_store(client, bundle, metrics)
    return FallbackStore(store, embedded, limit_s, metrics.store, structlog.get_logger())
