"""What interactions say of a user beyond the bundle."""

from dataclasses import dataclass

# Likes kept ready for a prompt, the newest: several windows of the paper's ten. More would never be read.
MAX_LIKES = 100


@dataclass(frozen=True, slots=True, order=True)
class Like:
    """A positive interaction, in the order of a history: by the client's time, then by event id."""

    timestamp: float  # UTC seconds
    event_id: str
    item_id: str


@dataclass(frozen=True, slots=True)
class LiveUser:
    """A user's newest likes since the bundle, oldest first, and when the user was deleted, if ever.

    What the user did up to `deleted_at` (UTC seconds) is forgotten, the bundle's part included.
    """

    likes: tuple[Like, ...] = ()
    deleted_at: float | None = None
