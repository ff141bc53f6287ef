"""Requests: how many, with what outcome, and what was refused."""

from prometheus_client import CollectorRegistry, Counter, Histogram

# Every reason that the service refuses or gives up a request for; they exist from the start, so that rates do.
REASONS = (
    "queue_full",
    "deadline",
    "not_ready",
    "scoring_failed",
    "client_gone",
    "stopping",
    "rate_limit",
    "log_unavailable",
)

# A refusal waits for nothing: what takes longer than the first few of these is the event loop's own delay.
_REFUSAL_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class RequestMetrics:
    """What becomes of requests, whatever they ask."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter("sella_requests_total", "Requests answered.", ["route", "outcome"], registry=registry)
        self._refusals = Counter(
            "sella_refusals_total", "Requests refused or given up, by reason.", ["reason"], registry=registry
        )
        self._refusal_seconds = Histogram(
            "sella_refusal_seconds",
            "From a request's arrival to its 429.",
            buckets=_REFUSAL_SECONDS,
            registry=registry,
        )
        for route in ("/score", "/rank"):
            self._requests.labels(route, "ok")
        for reason in REASONS:
            self._refusals.labels(reason)

    def answered(self, route: str, outcome: str) -> None:
        """Count a request; `route` is a route's template, never a path."""
        self._requests.labels(route, outcome).inc()

    def refused(self, reason: str) -> None:
        """Count a request refused or given up."""
        self._refusals.labels(reason).inc()

    def refusal_took(self, seconds: float) -> None:
        """Record how long a request that was turned away at once waited for its answer."""
        self._refusal_seconds.observe(seconds)
