"""Every metric of one application."""

from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from service.metrics.interactions import InteractionMetrics

LEGS = ("lookup", "assemble", "queue", "forward", "total")

# From a warm GPU's millisecond to the longest deadline that a request may ask for.
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)
# A refusal waits for nothing: what takes longer than the first few of these is the event loop's own delay.
_REFUSAL_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def build_version() -> str:
    """Return the installed version, or "unknown" in a checkout that was never installed."""
    try:
        return version("sella")
    except PackageNotFoundError:
        return "unknown"


class Metrics:
    """The service's metrics. Each event is counted in one place, by one of these methods."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.interactions = InteractionMetrics(registry)
        self._requests = Counter("sella_requests_total", "Requests answered.", ["route", "outcome"], registry=registry)
        self._legs = Histogram(
            "sella_leg_seconds", "Time of each leg of a scored request.", ["leg"], buckets=_SECONDS, registry=registry
        )
        self._candidates = Histogram(
            "sella_request_candidates",
            "Candidates or pairs of a scored request.",
            ["route"],
            buckets=_COUNTS,
            registry=registry,
        )
        self._queue = Gauge("sella_queue_tokens", "Tokens that wait for the engine.", registry=registry)
        self._refusals = Counter(
            "sella_refusals_total", "Requests refused or given up, by reason.", ["reason"], registry=registry
        )
        self._refusal_seconds = Histogram(
            "sella_refusal_seconds",
            "From a request's arrival to its 429.",
            buckets=_REFUSAL_SECONDS,
            registry=registry,
        )
        self._cold_users = Counter(
            "sella_cold_users_total", "Users scored without training data, once a request.", registry=registry
        )
        self._cold_items = Counter(
            "sella_cold_items_total", "Scored candidates without training data, unknown ones too.", registry=registry
        )
        self._unknown_items = Counter(
            "sella_unknown_items_total", "Scored candidates from outside the catalogue.", registry=registry
        )
        self._restarts = Counter("sella_engine_restarts_total", "Worker processes lost.", registry=registry)
        self._ready = Gauge(
            "sella_ready", "1 while the service can score: engine and store ready, not stopping.", registry=registry
        )
        self._bundle = Gauge(
            "sella_bundle_info", "1 for each bundle that is served.", ["bundle_id", "merged_id"], registry=registry
        )
        build = Gauge("sella_build_info", "1; the label says what runs.", ["version"], registry=registry)
        build.labels(build_version()).set(1)
        for leg in LEGS:  # exist from the start, so that a rate over them does too
            self._legs.labels(leg)

    def answered(self, route: str, outcome: str) -> None:
        """Count a request; `route` is a route's template, never a path."""
        self._requests.labels(route, outcome).inc()

    def scored(self, route: str, candidates: int, legs: dict[str, float]) -> None:
        """Count a scored request's size and the seconds of its legs."""
        self._candidates.labels(route).observe(candidates)
        for leg, seconds in legs.items():
            self._legs.labels(leg).observe(seconds)

    def cold(self, users: int, items: int, unknown: int) -> None:
        """Count what was scored without training data."""
        self._cold_users.inc(users)
        self._cold_items.inc(items)
        self._unknown_items.inc(unknown)

    def queued(self, tokens: int) -> None:
        """Add tokens to the queue's depth; negative ones leave it."""
        self._queue.inc(tokens)

    def refused(self, reason: str) -> None:
        """Count a request refused or given up."""
        self._refusals.labels(reason).inc()

    def refusal_took(self, seconds: float) -> None:
        """Record how long a request that was turned away at once waited for its answer."""
        self._refusal_seconds.observe(seconds)

    def engine_restarted(self) -> None:
        """Count a worker process lost."""
        self._restarts.inc()

    def ready(self, ready: bool) -> None:
        """Record whether the service can score."""
        self._ready.set(int(ready))

    def serving(self, bundle_id: str, merged_id: str) -> None:
        """Name a bundle that is served."""
        self._bundle.labels(bundle_id, merged_id).set(1)

    def text(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self.registry)
