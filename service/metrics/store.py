"""Metrics of look-ups: where users and items came from, and what stood in the way."""

from contextlib import suppress
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Source = Literal["redis", "embedded"]
FallbackReason = Literal["timeout", "down", "error"]
FilledKind = Literal["user", "item"]
DamagedKind = Literal["user", "item", "likes", "outcomes", "counts", "deletion", "meta"]

# A look-up in memory takes microseconds; Redis a millisecond, a thousand candidates several; the limit cuts the rest.
_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class StoreMetrics:
    """The store's part of the metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "sella_store_lookup_seconds",
            "Time of a look-up that answered, by where the answer came from.",
            ["source"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._fallbacks = Counter(
            "sella_store_fallbacks_total",
            "Look-ups answered from the embedded tables although Redis is the store.",
            ["reason"],
            registry=registry,
        )
        self._filled = Counter(
            "sella_store_filled_total",
            "Users and items that Redis did not hold and the embedded tables did.",
            ["kind"],
            registry=registry,
        )
        self._damaged = Counter(
            "sella_store_damaged_total",
            "Records in Redis that could not be read; each was left out, and the embedded tables took its place.",
            ["kind"],
            registry=registry,
        )
        self._up = Gauge("sella_store_up", "1 while the store answers.", registry=registry)
        self._published = Gauge(
            "sella_store_published",
            "1 while Redis holds the whole of a served bundle.",
            ["bundle_id"],
            registry=registry,
        )
        self._evicts = Gauge(
            "sella_store_evicts", "1 if Redis is set up to remove keys when its memory is full.", registry=registry
        )
        self._pointer = Gauge(
            "sella_pointer_followed", "1 while the bundle that Redis points to is served.", registry=registry
        )
        self._hits = Counter("sella_item_cache_hits", "Items found in this process.", registry=registry)
        self._misses = Counter("sella_item_cache_misses", "Items asked of Redis.", registry=registry)
        self._bytes = Gauge("sella_item_cache_bytes", "Bytes of the items kept in this process.", registry=registry)
        self._of_bundle: dict[str, bool] = {}
        self._up.set(1)
        self._pointer.set(1)
        for source in get_args(Source):
            self._seconds.labels(source)
        for reason in get_args(FallbackReason):
            self._fallbacks.labels(reason)
        for kind in get_args(FilledKind):
            self._filled.labels(kind)
        for kind in get_args(DamagedKind):
            self._damaged.labels(kind)

    def looked_up(self, source: Source, seconds: float) -> None:
        """Record how long a look-up took."""
        self._seconds.labels(source).observe(seconds)

    def fell_back(self, reason: FallbackReason) -> None:
        """Count a look-up that Redis did not answer."""
        self._fallbacks.labels(reason).inc()

    def filled(self, kind: FilledKind, count: int) -> None:
        """Count what only the embedded tables knew."""
        self._filled.labels(kind).inc(count)

    def damaged(self, kind: DamagedKind) -> None:
        """Count a record that could not be read."""
        self._damaged.labels(kind).inc()

    def up(self, bundle_id: str, up: bool) -> None:
        """Record whether the store answers for a bundle that is served."""
        self._of_bundle[bundle_id] = up
        self._up.set(int(all(self._of_bundle.values())))

    def published(self, bundle_id: str, published: bool) -> None:
        """Record whether Redis holds the whole of a bundle that is served."""
        self._published.labels(bundle_id).set(int(published))

    def closed(self, bundle_id: str) -> None:
        """Forget a bundle that is no longer served."""
        self._of_bundle.pop(bundle_id, None)
        self._up.set(int(all(self._of_bundle.values())))
        with suppress(KeyError):
            self._published.remove(bundle_id)

    def evicts(self, evicts: bool) -> None:
        """Record whether Redis may remove keys when its memory is full."""
        self._evicts.set(int(evicts))

    def pointer(self, followed: bool) -> None:
        """Record whether the bundle that Redis points to is served."""
        self._pointer.set(int(followed))

    def cache_asked(self, hits: int, misses: int) -> None:
        """Count items found in the cache and not found."""
        self._hits.inc(hits)
        self._misses.inc(misses)

    def cache_holds(self, size: int) -> None:
        """Record the bytes of the cache."""
        self._bytes.set(size)
