"""Metrics of the connections themselves, before and around their requests."""

from prometheus_client import CollectorRegistry, Counter, Gauge

CUT_OFF = ("head_timeout", "body_timeout", "write_timeout", "idle", "crowded_out", "refused", "invalid_http")


class ConnectionMetrics:
    """Open connections, and those that were ended for what they did."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._open = Gauge("sella_connections", "Open connections.", registry=registry)
        self._cut_off = Counter(
            "sella_connections_cut_off_total",
            "Connections ended by the server, by reason.",
            ["reason"],
            registry=registry,
        )
        for reason in CUT_OFF:  # exist from the start, so that a rate over them does too
            self._cut_off.labels(reason)

    def opened(self) -> None:
        """Count a connection in."""
        self._open.inc()

    def closed(self) -> None:
        """Count a connection out."""
        self._open.dec()

    def cut_off(self, reason: str) -> None:
        """Count a connection that the server ended."""
        self._cut_off.labels(reason).inc()
