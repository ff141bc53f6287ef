"""What servers share, in memory: the rules of `SharedInteractions` in their plainest form."""

import asyncio
from collections.abc import Mapping, Sequence

from service.interactions.event import LogEntry
from service.interactions.shared import CountTable, Impression, SharedStoreError


class SharedMemory:
    """A `SharedInteractions` that can be made to fail, to be slow and to lose everything."""

    def __init__(self) -> None:
        self.down = False
        self.delay_s = 0.0
        self.loses_before_apply = False
        self.fails_after = -1  # applied, but the answer is lost, that many times from now
        self.lose_everything()

    def lose_everything(self) -> None:
        self.markers: dict[str, int] = {}
        self.states: dict[str, int] = {}
        self.counts: dict[tuple[str, str], list[int]] = {}
        self.likes: dict[str, dict[str, tuple[float, str]]] = {}
        self.deleted: dict[str, float] = {}
        self.applied_seqs: list[int] = []
        self.tables: list[CountTable] = []
        self.filled: set[tuple[str, str]] = set()
        self.told: dict[str, list[Impression]] = {}

    async def applied(self, log_id: str) -> int:
        await self._answer()
        return self.markers.get(log_id, 0)

    async def apply(self, log_id: str, entries: Sequence[LogEntry], after: int | None = None) -> None:
        await self._answer()
        if self.loses_before_apply:
            self.loses_before_apply = False
            self.lose_everything()
        if after is not None and self.markers.get(log_id, 0) != after:
            raise SharedStoreError("elsewhere")
        for entry in entries:
            self._apply(entry)
        self.markers[log_id] = entries[-1].seq
        if self.fails_after > 0:
            self.fails_after -= 1
            raise SharedStoreError("the answer was lost")

    async def deletions(self) -> Mapping[str, float]:
        await self._answer()
        return dict(self.deleted)

    async def unfilled(self, log_id: str) -> Sequence[CountTable]:
        await self._answer()
        return [table for table in self.tables if (table.number, log_id) not in self.filled]

    async def fill(self, log_id: str, table: CountTable, impressions: Sequence[Impression], *, last: bool) -> None:
        await self._answer()
        self.told[table.number] = [*self.told.get(table.number, ()), *impressions]
        if last:
            self.filled.add((table.number, log_id))

    async def _answer(self) -> None:
        await asyncio.sleep(self.delay_s)
        if self.down:
            raise SharedStoreError("down")

    def _apply(self, entry: LogEntry) -> None:
        self.applied_seqs.append(entry.seq)
        one = entry.interaction
        if entry.kind == "deletion":
            self.deleted[one.user_id] = max(one.timestamp, self.deleted.get(one.user_id, 0.0))
            self.likes.pop(one.user_id, None)
            self.counts.pop(("user", one.user_id), None)
            return
        arrived = 1 if entry.kind == "expiry" else 0 if one.label is None else 1 + one.label
        before = self.states.get(one.impression_id, 0)
        after = max(before, arrived)
        self.states[one.impression_id] = after
        for key in (("user", one.user_id), ("item", one.item_id)):
            counted = self.counts.setdefault(key, [0, 0])
            counted[0] += before == 0 != after
            counted[1] += before != 2 == after
        if arrived == 2:
            self.likes.setdefault(one.user_id, {})[one.event_id] = (one.timestamp, one.item_id)
