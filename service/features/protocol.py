"""What a feature store is: users and items of one bundle, in one batched, asynchronous call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from models.features import HistoryItem, ItemFeatures, UserFeatures
from service.interactions.counts import NOTHING_COUNTED, Counted
from service.interactions.live import LiveUser
from service.metrics.store import DamagedKind


@dataclass(frozen=True, slots=True)
class Query:
    """What one request needs to know, each id once.

    The items of a stored history are not known before the user is; a store answers them along with the user, so that
    a request costs one round trip.
    """

    user_ids: frozenset[str]
    item_ids: frozenset[str]
    histories_of: frozenset[str]  # users whose stored history stands in a prompt: its items are wanted too
    counts_of: frozenset[str] = frozenset()  # items whose live counts are wanted; users' live counts always are


@dataclass(frozen=True, slots=True)
class Features:
    """What is known; ids that nothing is known of are missing.

    `items` are those asked for, whole: only they can be candidates. `history_items` are those that only the stored
    histories and the likes in `live` name; a store may answer them without the vectors behind a candidate's slots.
    `live` holds what other servers shared through the store: likes of the users whose stored history was wanted,
    outcomes and deletions of all users asked for. `counted` holds the live counts of all servers since the end of the
    bundle's own counts. `held` is False if the store does not have the bundle, and so no user and item of it. `damaged`
    has a kind for each record that could not be read and was left out.
    `tells_deletions` is False where other servers may have deleted users and could not be asked.
    """

    users: Mapping[str, UserFeatures]
    items: Mapping[str, ItemFeatures]
    live: Mapping[str, LiveUser] = field(default_factory=dict)
    history_items: Mapping[str, HistoryItem] = field(default_factory=dict)
    counted: Counted = NOTHING_COUNTED
    held: bool = True
    damaged: Sequence[DamagedKind] = ()
    tells_deletions: bool = True

    def history_item(self, item_id: str) -> HistoryItem | None:
        """Return what is known of an item of a history, however it came to be known."""
        return self.items.get(item_id) or self.history_items.get(item_id)


@dataclass(frozen=True, slots=True)
class StoreHealth:
    """What `/readyz` tells about a store; `tells_deletions` is that of `Features`."""

    ready: bool
    detail: str
    tells_deletions: bool = True


class FeatureStore(Protocol):
    """Looks up users and items under one bundle's id: vectors of two bundles never mix."""

    async def look_up(self, bundle_id: str, query: Query) -> Features:
        """Return everything that the query names and the bundle knows."""
        ...

    async def health(self) -> StoreHealth:
        """Return whether the store answers."""
        ...

    async def close(self) -> None:
        """End what the store does in the background and free what it keeps of the bundle."""
        ...
