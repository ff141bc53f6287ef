"""The bundle's own tables as a store: memory of this process, no server needed."""

import time
from collections.abc import Iterable

from models.features import ItemFeatures, Tables
from service.features.protocol import Features, Query, StoreHealth
from service.metrics.store import StoreMetrics


class EmbeddedStore:
    """A `FeatureStore` over the tables of one bundle."""

    def __init__(self, bundle_id: str, tables: Tables, metrics: StoreMetrics | None = None) -> None:
        self._bundle_id = bundle_id
        self._tables = tables
        self._metrics = metrics

    async def look_up(self, bundle_id: str, query: Query) -> Features:
        """Return everything that the query names and the bundle knows.

        Raises:
            KeyError: the query is for another bundle than these tables are of.
        """
        if bundle_id != self._bundle_id:
            raise KeyError(f"these tables are of bundle {self._bundle_id[:12]}, not {bundle_id[:12]}")
        started = time.monotonic()
        users = {one: user for one in query.user_ids if (user := self._tables.user(one)) is not None}
        liked = {one for user_id in query.histories_of & users.keys() for one in users[user_id].history}
        found = Features(users, self._items(query.item_ids), history_items=self._items(liked - query.item_ids))
        if self._metrics is not None:
            self._metrics.looked_up("embedded", time.monotonic() - started)
        return found

    def may_use(self, user_id: str, deleted_at: float | None) -> bool:
        """Return whether what the bundle has of a user, if anything, is from after the user's deletion, if any."""
        if deleted_at is None:
            return True
        user = self._tables.user(user_id)
        return user is not None and user.may_be_used(deleted_at)

    def _items(self, item_ids: Iterable[str]) -> dict[str, ItemFeatures]:
        return {one: item for one in item_ids if (item := self._tables.item(one)) is not None}

    async def health(self) -> StoreHealth:
        """Return that the tables are there: they are memory."""
        return StoreHealth(True, f"embedded: {len(self._tables.user_ids)} users, {len(self._tables.item_ids)} items")

    async def close(self) -> None:
        """Do nothing: the tables go with the bundle."""
