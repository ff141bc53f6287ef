"""What a client reports: an item was shown to a user, and what came of it; and the log's entries made of that."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Interaction:
    """An impression, its outcome, or both at once.

    `label` is None while nothing is known of the outcome yet. `request_id` and `position` name the answer that showed
    the item: its `index` in /score, its `rank` in /rank. The log sets `impression` where the rule of `impression_id`
    does not hold: a request id that was used again, or an entry of a version with another rule.
    """

    event_id: str
    user_id: str
    item_id: str
    label: bool | None
    timestamp: float  # UTC seconds, the client's
    request_id: str | None = None
    position: int | None = None
    impression: str | None = None

    @property
    def impression_id(self) -> str:
        """What an impression and its outcome have in common: the answer's place, or the user's event itself."""
        if self.impression is not None:
            return self.impression
        if self.request_id is None:  # event ids are the client's own, and two clients may use the same
            return "\x1f".join((self.event_id, self.user_id))
        place = "" if self.position is None else str(self.position)
        return "\x1f".join((self.request_id, place, self.user_id, self.item_id))


# event: as reported. expiry: the attribution window of an impression passed without an outcome; it is a negative.
# deletion: the user is forgotten; only user_id and timestamp (when) mean anything.
EntryKind = Literal["event", "expiry", "deletion"]


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One entry of the log, in its order; `seq` grows by at least one an entry and is never used twice."""

    seq: int
    kind: EntryKind
    interaction: Interaction
