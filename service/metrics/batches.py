"""The queue and the batches that leave it."""

from prometheus_client import CollectorRegistry, Gauge

from service.batcher import BatchSize
from service.metrics.arrays import ArrayHistogram

_TOKENS = (64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 8192, 16384)
_REQUESTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
_CANDIDATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
KINDS = ("score", "distil")


class BatchMetrics:
    """How much waits, and how large the batches are that the engine is handed."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._queue = Gauge("sella_queue_tokens", "Tokens that wait for the engine.", registry=registry)
        self._tokens = ArrayHistogram(
            "sella_batch_tokens", "Tokens of a batch handed to the engine, as expected.", ["kind"], _TOKENS, registry
        )
        self._requests = ArrayHistogram(
            "sella_batch_requests", "Requests that share a batch.", ["kind"], _REQUESTS, registry
        )
        self._candidates = ArrayHistogram(
            "sella_batch_candidates", "Candidates of a batch of scores.", [], _CANDIDATES, registry
        )
        self._candidates.begin()
        for kind in KINDS:
            self._tokens.begin(kind)
            self._requests.begin(kind)

    def queued(self, tokens: int) -> None:
        """Add tokens to the queue's depth; negative ones leave it."""
        self._queue.inc(tokens)

    def sent(self, size: BatchSize) -> None:
        """Record a batch that the engine was handed."""
        self._tokens.observe([size.tokens], size.kind)
        self._requests.observe([size.requests], size.kind)
        if size.kind == "score":
            self._candidates.observe([size.candidates])
