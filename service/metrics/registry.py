"""Every metric of one application."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, generate_latest

from service.metrics.access import AccessMetrics
from service.metrics.batches import BatchMetrics
from service.metrics.bundles import BundleMetrics
from service.metrics.connections import ConnectionMetrics
from service.metrics.drift import DriftMetrics
from service.metrics.engine import EngineMetrics
from service.metrics.interactions import InteractionMetrics
from service.metrics.quality import QualityMetrics
from service.metrics.requests import RequestMetrics
from service.metrics.scored import ScoredMetrics, Tally
from service.metrics.store import StoreMetrics

LEGS = ("lookup", "assemble", "queue", "forward", "total")

# Latest values that a figure is of: at ten thousand an AUC is known to about 0.01, and drift within a few minutes of
# traffic. Ten thousand labelled scores take 50 kB a bundle.
WINDOW = 10_000


def build_version() -> str:
    """Return the installed version, or "unknown" in a checkout that was never installed."""
    try:
        return version("sella")
    except PackageNotFoundError:
        return "unknown"


def bundle_label(bundle_id: str) -> str:
    """Return what a bundle is called in metrics: enough of its id to tell it from any other."""
    return bundle_id[:12]


class Metrics:
    """The service's metrics on one registry, a class for each noun. Each event is counted in one place."""

    def __init__(self, drift_window: int = WINDOW, quality_window: int = WINDOW) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.interactions = InteractionMetrics(registry)
        self._requests = RequestMetrics(registry)
        self._batches = BatchMetrics(registry)
        self._scored = ScoredMetrics(registry)
        self._drift = DriftMetrics(registry, drift_window)
        self.engine = EngineMetrics(registry)
        self.quality = QualityMetrics(registry, quality_window)
        self.access = AccessMetrics(registry)
        self.connections = ConnectionMetrics(registry)
        self._ready = Gauge(
            "sella_ready", "1 while the service can score: engine and store ready, not stopping.", registry=registry
        )
        self.store = StoreMetrics(registry)
        self.bundles = BundleMetrics(registry)
        build = Gauge("sella_build_info", "1; the label says what runs.", ["version"], registry=registry)
        build.labels(build_version()).set(1)
        # What many parts of the service count, by short names.
        self.answered = self._requests.answered
        self.refused = self._requests.refused
        self.refusal_took = self._requests.refusal_took
        self.queued = self._batches.queued
        self.batched = self._batches.sent
        self.engine_restarted = self.engine.restarted

    def loaded(self, bundle_id: str, reference: Mapping[str, Any]) -> None:
        """Let a bundle's series exist. `reference` is its manifest's; without one its drift is not known."""
        bundle = bundle_label(bundle_id)
        self._scored.begin(bundle)
        self._drift.begin(bundle, reference)
        self.quality.begin(bundle)

    def scored(self, bundle_id: str, route: str, legs: Mapping[str, float], tally: Tally) -> None:
        """Count a request that a loaded bundle scored; `legs` are seconds."""
        bundle = bundle_label(bundle_id)
        self._scored.add(bundle, route, legs, tally)
        self._drift.add(bundle, tally)

    def retired(self, bundle_id: str) -> None:
        """Drop a bundle's series: it is freed, and no request holds it any more."""
        bundle = bundle_label(bundle_id)
        for part in (self._scored, self._drift, self.quality):
            part.retire(bundle)

    def ready(self, ready: bool) -> None:
        """Record whether the service can score."""
        self._ready.set(int(ready))

    def text(self) -> bytes:
        """Return everything in Prometheus's text format."""
        self._drift.refresh()
        self.quality.refresh()
        return generate_latest(self.registry)
