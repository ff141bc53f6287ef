"""Follows the pointer in Redis to the bundle that is to be served."""

import asyncio
import re
from collections.abc import Awaitable, Callable

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from service.errors import ChangeRunningError
from service.features.keys import POINTER

_BUNDLE_ID = re.compile(r"[0-9a-f]{64}")


class PointerWatch:
    """Asks for the pointer every `interval_s` and tells of each new one, once.

    While Redis is away nothing changes. What `on_change` raises is logged and the pointer not asked about again until
    it moves: a bundle that was refused would be refused every time. Only a change that is under way is waited for.
    """

    def __init__(
        self,
        client: Redis,
        interval_s: float,
        on_change: Callable[[str], Awaitable[None]],
        log: structlog.stdlib.BoundLogger,
        *,
        served: str = "",
    ) -> None:
        self._client = client
        self._interval_s = interval_s
        self._on_change = on_change
        self._log = log
        self._seen = served
        self._waiting = ""
        self._answers = True

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            pointed = await self._ask()
            if pointed is not None and pointed != self._seen and await self._tell(pointed):
                self._seen, self._waiting = pointed, ""
            await asyncio.sleep(self._interval_s)

    async def _tell(self, bundle_id: str) -> bool:
        """Tell of a pointer; return False for one that has to be told again."""
        if not _BUNDLE_ID.fullmatch(bundle_id):
            self._log.error("pointer_unusable", pointer=bundle_id[:80], key=POINTER)
            return True
        if bundle_id != self._waiting:
            self._log.info("pointer_moved", bundle_id=bundle_id)
        try:
            await self._on_change(bundle_id)
        except ChangeRunningError as error:
            if bundle_id != self._waiting:
                self._log.info("pointer_waits", bundle_id=bundle_id, reason=str(error))
            self._waiting = bundle_id
            return False
        except Exception as error:
            self._log.error("pointer_not_followed", bundle_id=bundle_id, reason=str(error))
        return True

    async def _ask(self) -> str | None:
        """Return the pointer; None if there is none, or no Redis."""
        try:
            told = await self._client.get(POINTER)
        except (RedisError, OSError) as error:
            if self._answers:
                self._log.warning("pointer_unknown", reason=str(error))
            self._answers = False
            return None
        self._answers = True
        return told.decode(errors="replace") if isinstance(told, bytes) else told
