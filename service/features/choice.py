"""Which store a bundle's users and items are looked up in."""

from dataclasses import dataclass

import structlog
from redis.asyncio import Redis

from models.features import Tables
from service.features.cache import ItemCache
from service.features.client import open_client
from service.features.codec import Codec
from service.features.embedded import EmbeddedStore
from service.features.fallback import FallbackStore
from service.features.keys import Keys
from service.features.protocol import FeatureStore
from service.features.redis import RedisStore
from service.interactions.redis import RedisInteractions
from service.interactions.shared import SharedInteractions
from service.metrics.store import StoreMetrics
from service.settings import EMBEDDED, Settings

# How long after an impression's window other servers' entries about it are waited for: a replay that lags by less joins
# them exactly.
LATE_S = 900.0


@dataclass(frozen=True)
class Stores:
    """What the stores of all bundles of a process share: the client of Redis, if there is one, and the item cache."""

    client: Redis | None  # None: the embedded tables alone
    keys: Keys
    cache: ItemCache
    limit_s: float
    impression_s: float  # how long the state of an impression is shared after its last change
    metrics: StoreMetrics
    log: structlog.stdlib.BoundLogger

    @classmethod
    def of(cls, settings: Settings, metrics: StoreMetrics, log: structlog.stdlib.BoundLogger) -> "Stores":
        """Return what the settings ask for; nothing connects yet."""
        limit_s = settings.redis_timeout_ms / 1000
        client = None if settings.store == EMBEDDED else open_client(settings.store, limit_s)
        keys = Keys(settings.redis_prefix)
        cache = ItemCache(settings.item_cache_mb * 2**20, metrics)
        return cls(client, keys, cache, limit_s, settings.attribution_s + LATE_S, metrics, log)

    def interactions(self, retention_s: float) -> SharedInteractions | None:
        """Return what servers share of interactions, if there is a Redis to share them in."""
        return (
            None if self.client is None else RedisInteractions(self.client, retention_s, self.impression_s, self.keys)
        )

    async def close(self) -> None:
        """Close the connections."""
        if self.client is not None:
            await self.client.aclose()


def open_store(bundle_id: str, tables: Tables, stores: Stores, counted_until: float | None = None) -> FeatureStore:
    """Return the store of one bundle: its own tables, behind Redis if there is one.

    `counted_until` is the end of the bundle's own counts, UTC seconds.
    """
    if stores.client is None:
        return EmbeddedStore(bundle_id, tables, stores.metrics)
    codec = Codec(tables.item_vectors_IC.shape[1], tables.semantic_ID.shape[1])
    redis = RedisStore(stores.client, bundle_id, codec, stores.cache, stores.keys, counted_until)
    embedded = EmbeddedStore(bundle_id, tables)
    return FallbackStore(redis, embedded, stores.limit_s, stores.metrics, stores.log)
