"""Redis as long as it answers in time, else the embedded tables: a request never fails for the store."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import structlog

from service.background import begin
from service.features.embedded import EmbeddedStore
from service.features.protocol import Features, Query, StoreHealth
from service.features.redis import LookUpError, NotPublishedError, RedisStore
from service.metrics.store import DamagedKind, FallbackReason, StoreMetrics

# Look-ups in a row that may fail before Redis is left alone: one may be the event loop's own delay.
FAILURES = 3
CHECK_S = 1.0
DAMAGE_TOLD_S = 60.0
REMEDY = "publish the bundle again: what is damaged of it is written anew; what is live comes again from the logs"


class FallbackStore:
    """A `FeatureStore` of one bundle over Redis and the bundle's own tables, which are always there.

    After some failures in a row no request asks Redis until a check in the background has found it well, so that a
    Redis that hangs costs a request nothing. The check runs from the first use until `close`. A bundle that is not in
    Redis, as a canary that nobody published, gets users and items from its tables and all that is live from Redis. A
    record that is damaged costs itself alone.
    """

    def __init__(
        self,
        redis: RedisStore,
        embedded: EmbeddedStore,
        limit_s: float,
        metrics: StoreMetrics,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self._redis = redis
        self._embedded = embedded
        self._limit_s = limit_s
        self._metrics = metrics
        self._log = log
        self._failures = 0
        self._trouble: LookUpError | None = None  # why Redis is left alone; None while it is asked
        self._detail = "redis: not asked yet"
        self._held: bool | None = None  # whether Redis holds the bundle; None until it was asked
        self._damage_told = float("-inf")
        self._watch: asyncio.Task[None] | None = None

    async def look_up(self, bundle_id: str, query: Query) -> Features:
        """Return everything that the query names and the bundle knows, from Redis or from the tables.

        Raises:
            KeyError: the query is for another bundle.
        """
        self._start()
        started = time.monotonic()
        if self._trouble is None:
            try:
                async with asyncio.timeout(self._limit_s):
                    found = await self._redis.look_up(bundle_id, query)
            except TimeoutError:
                reason = self._failed(
                    LookUpError("timeout", f"Redis does not answer within {self._limit_s * 1000:g} ms")
                )
            except LookUpError as error:
                reason = self._failed(error)
            else:
                self._failures = 0
                self._tell_damaged(found.damaged)
                found = await self._filled(bundle_id, query, found)
                self._metrics.looked_up("redis", time.monotonic() - started)
                return found
        else:
            reason = self._trouble.reason
        self._metrics.fell_back(reason)
        started = time.monotonic()
        found = await self._embedded.look_up(bundle_id, query)
        self._metrics.looked_up("embedded", time.monotonic() - started)
        return replace(found, tells_deletions=False)

    def _failed(self, error: LookUpError) -> FallbackReason:
        self._failures += 1
        if self._failures >= FAILURES:
            self._leave_alone(error)
        return error.reason

    async def _filled(self, bundle_id: str, query: Query, found: Features) -> Features:
        """Add what Redis lacks and the tables know: lost keys, damaged records, a bundle that was not published.

        What is from before a deletion stays out.
        """
        deleted = {one for one, live in found.live.items() if not self._embedded.may_use(one, live.deleted_at)}
        users = query.user_ids - found.users.keys() - deleted
        items = query.item_ids - found.items.keys()
        named = {one for user_id in query.histories_of & found.users.keys() for one in found.users[user_id].history}
        named |= {like.item_id for live in found.live.values() for like in live.likes}
        named -= found.items.keys() | found.history_items.keys() | items
        if not (users or items or named):
            return found
        known = await self._embedded.look_up(bundle_id, Query(users, items | named, query.histories_of & users))
        if found.held:
            self._metrics.filled("user", len(known.users))
            self._metrics.filled("item", len(known.items))
        return Features(
            users={**known.users, **found.users},
            items={**{one: known.items[one] for one in items & known.items.keys()}, **found.items},
            live=found.live,
            history_items={**known.items, **known.history_items, **found.history_items},
            counted=found.counted,
        )

    def _tell_damaged(self, damaged: Sequence[DamagedKind]) -> None:
        """Count records that could not be read, and log them now and then: a request may meet many."""
        for kind in damaged:
            self._metrics.damaged(kind)
        if damaged and time.monotonic() - self._damage_told >= DAMAGE_TOLD_S:
            self._damage_told = time.monotonic()
            kinds = sorted(set(damaged))
            self._log.warning("store_damaged", kinds=kinds, bundle_id=self._redis.bundle_id, remedy=REMEDY)

    async def health(self) -> StoreHealth:
        """Return ready, whatever Redis does, and in the detail where answers come from."""
        self._start()
        if self._trouble is None:
            return StoreHealth(True, self._detail)
        return StoreHealth(True, f"embedded tables, because {self._trouble}", tells_deletions=False)

    async def close(self) -> None:
        """End the check in the background and free the bundle's items."""
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch
        self._redis.forget()
        self._metrics.closed(self._redis.bundle_id)

    def _start(self) -> None:
        if self._watch is None:
            self._watch = begin(self._check_forever(), "store check")

    async def _check_forever(self) -> None:
        while True:
            await self._check()
            await asyncio.sleep(CHECK_S)

    async def _check(self) -> None:
        try:
            async with asyncio.timeout(self._limit_s):
                self._detail = await self._redis.check()
        except TimeoutError:
            self._leave_alone(LookUpError("timeout", f"Redis does not answer within {self._limit_s * 1000:g} ms"))
        except LookUpError as error:
            self._leave_alone(error)
        except NotPublishedError as error:
            self._detail = f"embedded tables, because {error}; likes, outcomes and deletions come from Redis"
            self._answered(held=False)
        else:
            self._answered(held=True)

    def _answered(self, *, held: bool) -> None:
        """Ask Redis again from now on, and tell if it has lost or got the bundle."""
        self._metrics.up(self._redis.bundle_id, True)
        self._metrics.published(self._redis.bundle_id, held)
        if self._trouble is not None:
            self._log.info("store_recovered", detail=self._detail)
            self._trouble = None
            self._failures = FAILURES - 1  # one failure more and it is left alone again
        if held != self._held:
            if self._held is not None or not held:
                event = "bundle_in_store" if held else "bundle_not_in_store"
                self._log.info(event, bundle_id=self._redis.bundle_id)
            self._held = held

    def _leave_alone(self, error: LookUpError) -> None:
        self._metrics.up(self._redis.bundle_id, False)
        if self._trouble is None or self._trouble.reason != error.reason:
            self._log.warning("store_lost", reason=error.reason, detail=str(error))
        self._trouble = error
