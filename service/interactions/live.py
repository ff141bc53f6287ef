"""What interactions say of a user beyond the bundle."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha1
from typing import NamedTuple

# Likes kept ready for a prompt, the newest: several windows of the paper's ten. Older ones are counted, because the
# number of all likes decides where an anchored window begins.
MAX_LIKES = 100
EARLIER_LIKES = 1000  # older likes that the log names, as many as a request's history may have; the rest is a number
USERS_AT_ONCE = (
    8  # handled on the event loop at a time: about two milliseconds, where a thread would cost one user more
)


@dataclass(frozen=True, slots=True, order=True)
class Like:
    """A positive interaction, in the order of a history: by the client's time, then by event id."""

    timestamp: float  # UTC seconds
    event_id: str
    item_id: str


LikeRow = tuple[float, str, str]  # the fields of a `Like`, as the log has them
Ends = Callable[[str, float | None], float]  # a user and the time of the deletion, if any: when the stored history ends


def nothing_stored(user_id: str, deleted_at: float | None) -> float:
    """Return that there is no stored history."""
    return float("-inf")


NAME_DIGITS = 16  # hex digits: enough to distinguish the impressions of one user


def impression_name(impression_id: str) -> str:
    """Return a short name of an impression, equal on all servers: the first hex digits of the sha1 of its id."""
    return sha1(impression_id.encode(), usedforsecurity=False).hexdigest()[:NAME_DIGITS]


class KnownOutcome(NamedTuple):
    """An impression with a known outcome; sorting orders outcomes by `shown`."""

    shown: float  # UTC seconds, the client's
    impression: str  # `impression_name` of its id
    item_id: str
    positive: bool


@dataclass(frozen=True, slots=True)
class LiveUser:
    """A user's newest likes and outcomes, oldest first, and the time of the user's deletion, if any.

    Everything up to `deleted_at` (UTC seconds) is forgotten, the bundle's part included. There are at most
    `MAX_OUTCOMES` outcomes; some may be older than the end of the bundle's own counts.

    `earlier` are likes before `likes`, newest first, and `more` is the number of likes before these; only likes after
    the end of the stored history.
    """

    likes: tuple[Like, ...] = ()
    deleted_at: float | None = None
    outcomes: tuple[KnownOutcome, ...] = ()
    earlier: tuple[LikeRow, ...] = ()
    more: int = 0
