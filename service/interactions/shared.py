"""What several servers share of interactions: likes, outcomes, counts and deletions, rebuilt from each server's log."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from service.interactions.event import LogEntry


class SharedStoreError(Exception):
    """The shared store does not answer, or not in time; what it was asked to take may or may not have been taken."""


@dataclass(frozen=True, slots=True)
class CountTable:
    """A shared table of live counts for one published bundle, of impressions shown after `since`, UTC seconds."""

    number: str
    since: float


class Impression(NamedTuple):
    """The ids of an impression whose outcome is known."""

    impression_id: str
    user_id: str
    item_id: str


class SharedInteractions(Protocol):
    """Takes log entries, each log's in order, and forgets nothing that it has acknowledged unless it loses all.

    Applying is idempotent. What is counted of an impression follows from its states, whatever comes twice, late or out
    of order: unknown or pending, then negative or positive. Entering negative or positive for the first time counts an
    impression for user and item, entering positive a positive; positive is final. Each published bundle has a table of
    these counts, of impressions shown after the end of the bundle's own counts. Servers fill in from their logs the
    entries that were applied before the table began.
    """

    async def applied(self, log_id: str) -> int:
        """Return the `seq` of the last entry of a log that was applied; 0 for none, as after a restart with no data.

        Raises:
            SharedStoreError: it does not answer.
        """
        ...

    async def apply(self, log_id: str, entries: Sequence[LogEntry], after: int | None = None) -> None:
        """Apply entries and remember the last one's `seq`, both or neither.

        `after` is what `applied` has answered: a store that has lost everything since must not seem complete. None
        applies to whatever is there.

        Raises:
            SharedStoreError: it does not answer, or `applied` would answer something else than `after` by now.
        """
        ...

    async def deletions(self) -> Mapping[str, float]:
        """Return when each deleted user was deleted, UTC seconds.

        Raises:
            SharedStoreError: it does not answer.
        """
        ...

    async def unfilled(self, log_id: str) -> Sequence[CountTable]:
        """Return the tables of counts that lack the entries of a log that were applied before the tables began.

        Raises:
            SharedStoreError: it does not answer.
        """
        ...

    async def fill(self, log_id: str, table: CountTable, impressions: Sequence[Impression], *, last: bool) -> None:
        """Count the impressions that a table has not counted yet; `last` marks the last part of the log.

        Raises:
            SharedStoreError: it does not answer.
        """
        ...
