"""What several servers share of interactions: likes, counts and deletions, rebuilt from each server's log."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from service.interactions.event import LogEntry


class SharedStoreError(Exception):
    """The shared store does not answer, or not in time; what it was asked to take may or may not have been taken."""


@dataclass(frozen=True, slots=True)
class CountTable:
    """The counts that servers share for one published bundle, of impressions shown after `since`, UTC seconds."""

    number: str
    since: float


class Impression(NamedTuple):
    """An impression whose outcome is known, by its names alone."""

    impression_id: str
    user_id: str
    item_id: str


class SharedInteractions(Protocol):
    """Takes log entries, each log's in order, and forgets nothing that it has acknowledged unless it loses all.

    Applying is idempotent. What is counted of an impression follows from its states, whatever comes twice, late or out
    of order: unknown or pending, then negative or positive. Entering negative or positive for the first time counts an
    impression for user and item, entering positive a positive; positive is final. Each published bundle has a table of
    such counts, of what was shown since its own; what was applied before it had one is filled in from the logs.
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
        """Return the tables of counts that lack what was applied of a log before they were begun.

        Raises:
            SharedStoreError: it does not answer.
        """
        ...

    async def fill(self, log_id: str, table: CountTable, impressions: Sequence[Impression], *, last: bool) -> None:
        """Count those impressions that a table has not counted yet; with the last ones the log's part is complete.

        Raises:
            SharedStoreError: it does not answer.
        """
        ...
