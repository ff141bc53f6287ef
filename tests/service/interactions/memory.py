"""What servers share, in memory, for tests of the replay: it can fail, be slow and lose everything.

Its rules are too plain to be compared with: the log is compared with the scripts themselves.
"""

import asyncio
from collections.abc import Mapping, Sequence

from service.interactions.event import LogEntry
from service.interactions.shared import CountTable, Deletions, Impression, KnownBefore, SharedStoreError


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
        self.numbers: dict[str, int] = {}
        self.applied_seqs: list[int] = []
        self.tables: list[CountTable] = []
        self.filled: set[tuple[str, str]] = set()
        self.told: dict[str, list[Impression]] = {}

    async def applied(self, epochs: Sequence[str]) -> list[int]:
        await self._answer()
        return [self.markers.get(one, 0) for one in epochs]

    async def apply(
        self,
        epoch: str,
        entries: Sequence[LogEntry],
        after: int | None = None,
        *,
        log_id: str = "",
        known: Mapping[int, KnownBefore] | None = None,
        anew: bool = False,
    ) -> None:
        await self._answer()
        if self.loses_before_apply:
            self.loses_before_apply = False
            self.lose_everything()
        if after is not None and self.markers.get(epoch, 0) != after:
            raise SharedStoreError("elsewhere")
        for entry in entries:
            self._apply(entry)
        self.markers[epoch] = entries[-1].seq
        if self.fails_after > 0:
            self.fails_after -= 1
            raise SharedStoreError("the answer was lost")

    async def deletions(self, mark: float, limit: int) -> Deletions:
        await self._answer()
        users = sorted((number, user) for user, number in self.numbers.items() if number > mark)[:limit]
        found = [(user, self.deleted[user]) for _, user in users]
        return Deletions(found, users[-1][0] if users else mark, len(users) == limit)

    def delete(self, user_id: str, when: float) -> None:
        """Delete a user as another server would."""
        self.deleted[user_id] = max(when, self.deleted.get(user_id, 0.0))
        self.numbers[user_id] = max(self.numbers.values(), default=0) + 1

    async def unfilled(self, log_id: str, epochs: Sequence[str]) -> Sequence[CountTable]:
        await self._answer()
        return [table for table in self.tables if (table.number, log_id) not in self.filled]

    async def fill(self, log_id: str, table: CountTable, impressions: Sequence[Impression], *, last: bool) -> None:
        await self._answer()
        self.told[table.number] = [*self.told.get(table.number, ()), *impressions]
        if last:
            self.filled.add((table.number, log_id))

    async def lost(self, users: Sequence[str], deletions: Sequence[tuple[str, float]]) -> tuple[str, ...]:
        await self._answer()
        return tuple(user for user in users if user not in self.likes and user not in self.deleted)

    async def begin_again(self) -> None:
        await self._answer()
        self.markers = {}

    async def _answer(self) -> None:
        await asyncio.sleep(self.delay_s)
        if self.down:
            raise SharedStoreError("down")

    def _apply(self, entry: LogEntry) -> None:
        self.applied_seqs.append(entry.seq)
        one = entry.interaction
        if entry.kind == "deletion":
            self.delete(one.user_id, one.timestamp)
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
