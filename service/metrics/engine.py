"""What the engines did."""

from prometheus_client import CollectorRegistry, Counter


class EngineMetrics:
    """Workers lost."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._restarts = Counter("sella_engine_restarts_total", "Worker processes lost.", registry=registry)

    def restarted(self) -> None:
        """Count a worker process lost."""
        self._restarts.inc()
