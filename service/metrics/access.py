"""Metrics of who is let in."""

from prometheus_client import CollectorRegistry, Counter

UNAUTHORIZED = ("missing", "malformed", "unknown", "forbidden")


class AccessMetrics:
    """What the gate turns away."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._unauthorized = Counter(
            "sella_unauthorized_total", "Requests turned away for their key, by reason.", ["reason"], registry=registry
        )
        self._rate_limited = Counter(
            "sella_rate_limited_total", "Requests over their client's rate.", registry=registry
        )
        for reason in UNAUTHORIZED:  # exist from the start, so that a rate over them does too
            self._unauthorized.labels(reason)

    def unauthorized(self, reason: str) -> None:
        """Count a 401 or 403."""
        self._unauthorized.labels(reason).inc()

    def rate_limited(self) -> None:
        """Count a 429 for a client's rate."""
        self._rate_limited.inc()
