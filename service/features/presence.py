"""Tells Redis which bundles this server serves, so that their keys stay, and keeps house there.

Keys of bundles that nobody serves get their end, and a Redis that is set up to remove keys by itself is warned of.
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from service.features.client import evicting, evicts, open_publisher
from service.features.keys import Keys
from service.features.supersede import expire_superseded, remove_stale_counts, shorten_impressions
from service.metrics.store import StoreMetrics

TELL_S = 20.0
STAYS_S = 300.0  # how long a server that is cut off from Redis is believed to serve on
HOUSE_TIMEOUT_S = 2.0  # of one command
HOUSE_S = 60.0  # how often to look for bundles that nobody serves any more


class Presence:
    """Says what is served until it is closed; while Redis is away, nothing is told."""

    def __init__(
        self,
        client: Redis,
        url: str,
        keys: Keys,
        served: Callable[[], Iterable[str]],
        metrics: StoreMetrics,
        log: structlog.stdlib.BoundLogger,
        impression_s: float,
    ) -> None:
        """`served` gives the ids of the bundles that requests may still look up. `impression_s`: how long the state of
        an impression is kept at most.
        """
        self._client = client
        self._url = url
        self._keys = keys
        self._served = served
        self._metrics = metrics
        self._log = log
        self._impression_s = impression_s
        self._name = uuid.uuid4().hex
        self._told: set[str] = set()
        self._kept_house_at = float("-inf")
        self._policy = ""
        self._closing = False

    async def run(self) -> None:
        """Tell until cancelled, then take it back."""
        try:
            while True:
                with suppress(RedisError, OSError):
                    await self._tell(self._served())
                with suppress(RedisError, OSError):
                    self._warn(await self._client.info("memory"))
                with suppress(RedisError, OSError, InterruptedError):
                    if time.monotonic() - self._kept_house_at >= HOUSE_S:
                        await asyncio.to_thread(self._keep_house, first=self._kept_house_at < 0)
                        self._kept_house_at = time.monotonic()
                await asyncio.sleep(TELL_S)
        finally:
            self._closing = True
            with suppress(RedisError, OSError):
                await self._tell(set())

    async def _tell(self, served: Iterable[str]) -> None:
        now, members = time.time(), {f"{one}:{self._name}" for one in served}
        async with self._client.pipeline(transaction=True) as pipe:
            pipe.zremrangebyscore(self._keys.serving, "-inf", now)
            for one in self._told - members:
                pipe.zrem(self._keys.serving, one)
            for one in members:
                pipe.zadd(self._keys.serving, {one: now + STAYS_S})
            await pipe.execute()
        self._told = members

    def _warn(self, memory: Mapping[str, object]) -> None:
        policy = evicting(memory)
        self._metrics.evicts(bool(policy))
        if policy and policy != self._policy:
            self._log.warning("store_evicts", policy=policy, remedy=evicts(policy))
        self._policy = policy

    def _keep_house(self, *, first: bool) -> None:
        """Go through Redis, which may take minutes. It ends with the server: the process waits for its threads."""

        def tick(_: int) -> None:
            if self._closing:
                raise InterruptedError

        with closing(open_publisher(self._url, HOUSE_TIMEOUT_S)) as client:
            if first:
                shorten_impressions(client, self._keys, self._impression_s, tick)
            remove_stale_counts(client, self._keys, tick)
            ended = expire_superseded(client, self._keys, tick)
        if ended:
            self._log.info("superseded_ends", keys=ended)
