"""Live counts: impressions with a known outcome and positives, counted since the end of a bundle's own counts.

The counts follow the log: one query fills them, and the log's writer reports the changes after each commit.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from models.fusion import Counts

PENDING, NEGATIVE, POSITIVE = 0, 1, 2


class Standing(NamedTuple):
    """The state of an impression, and the time when the item was shown, UTC seconds by the client."""

    state: int
    shown: float

    def counts(self, until: float) -> Counts:
        """Return what the impression adds to the live counts of a bundle whose own counts end at `until`."""
        known = self.state != PENDING and self.shown > until
        return Counts(int(known), int(known and self.state == POSITIVE))


@dataclass(frozen=True, slots=True)
class Change:
    """The change of an impression by one log entry. `item_id` is None if the item's counts do not change."""

    seq: int
    user_id: str
    item_id: str | None
    before: Standing
    after: Standing


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A user was deleted; the changes after it count the remaining impressions of the user again."""

    seq: int
    user_id: str


LogChange = Change | Forgotten
Table = Mapping[str, Counts]


@dataclass(frozen=True, slots=True)
class Counted:
    """The live counts of one request, without ids never counted. `live` is False if no live counts are available."""

    live: bool
    users: Table
    items: Table


NOTHING_COUNTED = Counted(False, {}, {})


def larger(*counted: Counted) -> Counted:
    """Return the larger counts of several sources; each may lack the latest changes, and none counts anything twice."""
    live = [one for one in counted if one.live]
    if len(live) < 2:
        return live[0] if live else NOTHING_COUNTED
    return Counted(True, _larger([one.users for one in live]), _larger([one.items for one in live]))


def _larger(tables: Sequence[Table]) -> Table:
    joined: dict[str, Counts] = {}
    for table in tables:
        for one, counts in table.items():
            before = joined.get(one, counts)
            joined[one] = Counts(*map(max, before, counts))
    return joined


class LiveCounts:
    """The live counts of one bundle.

    Threads: any thread may call `of` and `live`. They take no lock, because every value is replaced in one step. The
    other methods change the counts under one lock: `apply` and `refill` in the log's writer thread, `collect` and
    `fill` in another thread.
    """

    def __init__(self, until: float) -> None:
        """`until` is the end of the bundle's own counts, UTC seconds: impressions shown up to then are not counted."""
        self.until = until
        self._lock = threading.Lock()
        self._tables: tuple[dict[str, Counts], dict[str, Counts]] | None = None  # users, items; None: not filled
        self._waiting: list[LogChange] | None = None  # changes during a `fill`; None: no `fill` is running

    @property
    def live(self) -> bool:
        """Whether the counts are filled, and so include every acknowledged interaction."""
        return self._tables is not None

    def of(self, user_ids: Iterable[str], item_ids: Iterable[str]) -> Counted:
        """Return the counts of users and items."""
        if self._tables is None:
            return NOTHING_COUNTED
        users, items = self._tables
        return Counted(
            True,
            {one: counts for one in user_ids if (counts := users.get(one)) is not None},
            {one: counts for one in item_ids if (counts := items.get(one)) is not None},
        )

    def refill(self, users: Table, items: Table) -> None:
        """Replace the counts by those of the log. The writer's thread calls it, so no change comes in between."""
        with self._lock:
            self._tables, self._waiting = (dict(users), dict(items)), None

    def collect(self) -> None:
        """Keep changes from now on for the `fill` that follows."""
        with self._lock:
            self._waiting = []

    def fill(self, seq: int, users: Table, items: Table) -> None:
        """Set the counts to those of the log up to `seq` and add the collected changes; do nothing after a `refill`."""
        with self._lock:
            if self._tables is None and self._waiting is not None:
                tables = dict(users), dict(items)
                for change in self._waiting:
                    if change.seq > seq:
                        self._apply(tables, change)
                self._tables = tables
            self._waiting = None

    def apply(self, changes: Sequence[LogChange]) -> None:
        """Apply the changes of one commit of the log."""
        with self._lock:
            if self._tables is not None:
                for change in changes:
                    self._apply(self._tables, change)
            elif self._waiting is not None:
                self._waiting += changes

    def _apply(self, tables: tuple[dict[str, Counts], dict[str, Counts]], change: LogChange) -> None:
        users, items = tables
        if isinstance(change, Forgotten):
            users.pop(change.user_id, None)
            return
        before, after = change.before.counts(self.until), change.after.counts(self.until)
        if before != after:
            _move(users, change.user_id, before, after)
            if change.item_id is not None:
                _move(items, change.item_id, before, after)


def _move(table: dict[str, Counts], one: str, before: Counts, after: Counts) -> None:
    impressions, positives = table.get(one, Counts())
    table[one] = Counts(
        max(0, impressions + after.impressions - before.impressions),
        max(0, positives + after.positives - before.positives),
    )
