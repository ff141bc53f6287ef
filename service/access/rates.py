"""How often each client may ask: a token bucket for each, in bounded memory."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MAX_BUCKETS = 10_000


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class RateLimiter:
    """Token buckets by client. A bucket fills at the client's rate and holds what may come at once.

    At most `MAX_BUCKETS` clients are remembered. The one that has asked for nothing longest is forgotten first, which
    gives it a full bucket: what it would nearly have by then in any case.
    """

    def __init__(self, burst_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst_s = burst_s
        self._clock = clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, client: str, requests_per_s: float) -> int:
        """Take one request from a client's bucket; return 0, or the whole seconds after which there will be one."""
        now = self._clock()
        most = max(1.0, requests_per_s * self._burst_s)
        bucket = self._buckets.get(client)
        if bucket is None:
            bucket = self._buckets[client] = _Bucket(most, now)
            if len(self._buckets) > MAX_BUCKETS:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(client)
        bucket.tokens = min(most, bucket.tokens + (now - bucket.at) * requests_per_s)
        bucket.at = now
        if bucket.tokens >= 1:
            bucket.tokens -= 1
            return 0
        return max(1, math.ceil((1 - bucket.tokens) / requests_per_s))

    def __len__(self) -> int:
        return len(self._buckets)
