"""The bundle's own tables as a store: memory-mapped, in this process, no server needed."""

from models.features import Tables
from service.features.protocol import Features, Query, StoreHealth


class EmbeddedStore:
    """A `FeatureStore` over the tables of one bundle."""

    def __init__(self, bundle_id: str, tables: Tables) -> None:
        self._bundle_id = bundle_id
        self._tables = tables

    async def look_up(self, bundle_id: str, query: Query) -> Features:
        """Return everything that the query names and the bundle knows.

        Raises:
            KeyError: the query is for another bundle than these tables are of.
        """
        if bundle_id != self._bundle_id:
            raise KeyError(f"these tables are of bundle {self._bundle_id[:12]}, not {bundle_id[:12]}")
        users = {one: user for one in query.user_ids if (user := self._tables.user(one)) is not None}
        wanted = set(query.item_ids)
        for user_id in query.histories_of & users.keys():
            wanted.update(users[user_id].history)
        items = {one: item for one in wanted if (item := self._tables.item(one)) is not None}
        return Features(users, items)

    async def health(self) -> StoreHealth:
        """Return that the tables are there: they are memory."""
        return StoreHealth(True, f"embedded: {len(self._tables.user_ids)} users, {len(self._tables.item_ids)} items")
