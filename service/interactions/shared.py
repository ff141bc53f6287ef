"""What several servers share of interactions: likes, outcomes, counts and deletions, rebuilt from each server's log."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from service.interactions.event import LogEntry


class SharedStoreError(Exception):
    """The shared store does not answer, or not in time; what it was asked to take may or may not have been taken."""


@dataclass(frozen=True, slots=True)
class CountTable:
    """A shared table of live counts for one published bundle, of impressions shown after `since`, UTC seconds.

    `begun` has the last seq of each of a log's epochs that was applied when the table began; None if that is not known.
    `after` is the id of the last earlier impression of the log that was counted in the table, by id.
    """

    number: str
    since: float
    begun: tuple[int, ...] | None = None
    after: str = ""


class Impression(NamedTuple):
    """An impression whose outcome is known; `shown` is UTC seconds, the client's."""

    impression_id: str
    user_id: str
    item_id: str
    positive: bool
    shown: float


class KnownBefore(NamedTuple):
    """What a log knew of an impression before an entry: its state, and time and event id of its like."""

    state: int
    shown: float  # UTC seconds, the client's
    like: tuple[float, str] | None


class Deletions(NamedTuple):
    """Deletions in the order in which the store heard of them; `mark` is behind the last of them."""

    users: Sequence[tuple[str, float]]  # user id, UTC seconds
    mark: float
    more: bool


class SharedInteractions(Protocol):
    """Takes log entries, each log's in order, and forgets nothing that it has acknowledged unless it loses all.

    What is counted of an impression follows from its states, whatever comes late or from another log: unknown or
    pending, then negative or positive. Entering negative or positive for the first time counts an impression for user
    and item, entering positive a positive; positive is final. Each published bundle has a table of these counts, of
    impressions shown after the end of the bundle's own counts. Servers fill in from their logs the entries that were
    applied before the table began.

    An entry is applied once: each epoch of a log has a place up to which it was applied. The states of impressions are
    kept for about the attribution window alone, so an entry that is applied once more later may count twice.
    """

    async def applied(self, epochs: Sequence[str]) -> list[int]:
        """Return for each epoch the `seq` of the last entry that was applied; 0 for none, as after a loss of all data.

        Raises:
            SharedStoreError: it does not answer.
        """
        ...

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
        """Apply entries of an epoch and remember the last one's `seq`, both or neither.

        `after` is what `applied` has answered: a store that has lost everything since must not seem complete. None
        applies to whatever is there. `known` has by seq what the log knew of the impressions before the entries, for
        those that the store may not remember. `anew` says that nothing of the log was applied before.

        Raises:
            SharedStoreError: it does not answer, or `applied` would answer something else than `after` by now.
        """
        ...

    async def deletions(self, mark: float, limit: int) -> Deletions:
        """Return deletions that the store has heard of behind a mark; -inf for all.

        Raises:
            SharedStoreError: it does not answer.
        """
        ...

    async def unfilled(self, log_id: str, epochs: Sequence[str]) -> Sequence[CountTable]:
        """Return the tables of counts that lack the entries of a log that were applied before the tables began.

        Raises:
            SharedStoreError: it does not answer.
        """
        ...

    async def fill(self, log_id: str, table: CountTable, impressions: Sequence[Impression], *, last: bool) -> None:
        """Count the impressions behind `table.after` that a table has not counted yet; `last` marks the last part.

        Raises:
            SharedStoreError: it does not answer, or was told of these impressions before.
        """
        ...

    async def lost(self, users: Sequence[str], deletions: Sequence[tuple[str, float]]) -> tuple[str, ...]:
        """Return in words what the store has lost: likes of users who have some, or keys that it was made to remove.

        Tombstones that it lacks are put back.

        Raises:
            SharedStoreError: it does not answer.
        """
        ...

    async def begin_again(self) -> None:
        """Forget how far each log was applied, so that every server applies all of its log anew.

        Raises:
            SharedStoreError: it does not answer.
        """
        ...
