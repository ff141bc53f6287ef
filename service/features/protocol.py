"""What a feature store is: users and items of one bundle, in one batched, asynchronous call."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from models.features import ItemFeatures, UserFeatures
from service.interactions.live import LiveUser


@dataclass(frozen=True, slots=True)
class Query:
    """What one request needs to know, each id once.

    The items of a stored history are not known before the user is; a store answers them along with the user, so that
    a request costs one round trip.
    """

    user_ids: frozenset[str]
    item_ids: frozenset[str]
    histories_of: frozenset[str]  # users whose stored history stands in a prompt: its items are wanted too


@dataclass(frozen=True, slots=True)
class Features:
    """What is known; ids that nothing is known of are missing.

    `live` is what the store shares with other servers of the users whose stored history was wanted; the items of those
    likes are among `items`.
    """

    users: Mapping[str, UserFeatures]
    items: Mapping[str, ItemFeatures]
    live: Mapping[str, LiveUser] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoreHealth:
    """What `/readyz` tells about a store."""

    ready: bool
    detail: str


class FeatureStore(Protocol):
    """Looks up users and items under one bundle's id: vectors of two bundles never mix."""

    async def look_up(self, bundle_id: str, query: Query) -> Features:
        """Return everything that the query names and the bundle knows."""
        ...

    async def health(self) -> StoreHealth:
        """Return whether the store answers."""
        ...
