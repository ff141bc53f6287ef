"""Follows the pointer in Redis to the bundle that is to be served."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from service.errors import ChangeRunningError
from service.features.keys import Keys
from service.metrics.store import StoreMetrics

_BUNDLE_ID = re.compile(r"[0-9a-f]{64}")
# A pointer that was not followed is tried again after the interval, then after twice as long each time, up to this:
# a folder that is still being copied is there soon, and a bundle that is refused is hashed at each try.
LAST_RETRY_S = 300.0


class PointerWatch:
    """Asks for the pointer every `interval_s` and tells of each new one until it was followed.

    While Redis is away nothing changes. What `on_change` raises is logged, and the same pointer told again later, with
    growing pauses; a change that is under way is waited for without them.
    """

    def __init__(
        self,
        client: Redis,
        interval_s: float,
        on_change: Callable[[str], Awaitable[None]],
        log: structlog.stdlib.BoundLogger,
        *,
        served: str = "",
        keys: Keys = Keys(),  # noqa: B008 - frozen
        metrics: StoreMetrics | None = None,
    ) -> None:
        self._client = client
        self._interval_s = interval_s
        self._on_change = on_change
        self._log = log
        self._key = keys.pointer
        self._metrics = metrics
        self._seen = served  # the pointer that was followed last
        self._told = ""  # the one that was told last, and when it is told again
        self._retry_at = self._retry_s = 0.0
        self._answers = True

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            pointed = await self._ask()
            if pointed is not None:
                if pointed != self._seen and (pointed != self._told or time.monotonic() >= self._retry_at):
                    if await self._tell(pointed):
                        self._seen = pointed
                    self._told = pointed
                if self._metrics is not None:
                    self._metrics.pointer(pointed == self._seen)
            await asyncio.sleep(self._interval_s)

    async def _tell(self, bundle_id: str) -> bool:
        """Tell of a pointer; return False for one that has to be told again."""
        new = bundle_id != self._told
        if new:
            self._retry_s = self._interval_s
        if not _BUNDLE_ID.fullmatch(bundle_id):
            if new:
                self._log.error("pointer_unusable", pointer=bundle_id[:80], key=self._key)
            return False
        if new:
            self._log.info("pointer_moved", bundle_id=bundle_id)
        try:
            await self._on_change(bundle_id)
        except ChangeRunningError as error:
            if new:
                self._log.info("pointer_waits", bundle_id=bundle_id, reason=str(error))
            return False
        except Exception as error:
            self._retry_at = time.monotonic() + self._retry_s
            self._log.error(
                "pointer_not_followed", bundle_id=bundle_id, reason=str(error), again_in_s=round(self._retry_s, 1)
            )
            self._retry_s = min(2 * self._retry_s, max(LAST_RETRY_S, self._interval_s))
            return False
        return True

    async def _ask(self) -> str | None:
        """Return the pointer; None if there is none, or no Redis."""
        try:
            told = await self._client.get(self._key)
        except (RedisError, OSError) as error:
            if self._answers:
                self._log.warning("pointer_unknown", reason=str(error))
            self._answers = False
            return None
        self._answers = True
        return told.decode(errors="replace") if isinstance(told, bytes) else told
