"""Items that were looked up before, in this process, under a byte budget."""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from models.features import ItemFeatures

ABSENT_S = 5.0  # an item that is published meanwhile is seen after this long
_OVERHEAD_BYTES = 700  # of an entry's Python objects, the key among them


class CacheMetrics(Protocol):
    """What a cache tells of itself."""

    def cache_asked(self, hits: int, misses: int) -> None:
        """Count items found and not found."""
        ...

    def cache_holds(self, size: int) -> None:
        """Record the bytes held."""
        ...


@dataclass(frozen=True, slots=True)
class _Entry:
    item: ItemFeatures | None  # None: the store has no such item
    size: int
    until: float


class ItemCache:
    """A least-recently-used cache of whole items, keyed by bundle and item; shared by all bundles of a process."""

    def __init__(self, max_bytes: int, metrics: CacheMetrics, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._clock = clock
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._size = 0

    def find(self, bundle_id: str, item_ids: frozenset[str]) -> tuple[dict[str, ItemFeatures], list[str]]:
        """Return the items that are here, and the ids that have to be asked for: neither here nor known absent."""
        now = self._clock()
        found: dict[str, ItemFeatures] = {}
        missing: list[str] = []
        for item_id in item_ids:
            entry = self._entries.get((bundle_id, item_id))
            if entry is None or entry.until < now:
                missing.append(item_id)
                continue
            self._entries.move_to_end((bundle_id, item_id))
            if entry.item is not None:
                found[item_id] = entry.item
        self._metrics.cache_asked(len(item_ids) - len(missing), len(missing))
        return found, missing

    def put(self, bundle_id: str, items: Mapping[str, ItemFeatures | None]) -> None:
        """Keep items, or for a few seconds that there are none of these ids."""
        if not self._max_bytes:
            return
        absent_until = self._clock() + ABSENT_S
        for item_id, item in items.items():
            self._drop((bundle_id, item_id))
            size = _OVERHEAD_BYTES + (0 if item is None else _bytes(item))
            self._entries[bundle_id, item_id] = _Entry(item, size, absent_until if item is None else float("inf"))
            self._size += size
        while self._size > self._max_bytes:
            self._size -= self._entries.popitem(last=False)[1].size
        self._metrics.cache_holds(self._size)

    def forget(self, bundle_id: str) -> None:
        """Free everything of a bundle that is no longer served."""
        for key in [key for key in self._entries if key[0] == bundle_id]:
            self._drop(key)
        self._metrics.cache_holds(self._size)

    def _drop(self, key: tuple[str, str]) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._size -= entry.size


def _bytes(item: ItemFeatures) -> int:
    return len(item.title) + item.collab_C.nbytes + item.fold_C.nbytes + item.semantic_D.nbytes
