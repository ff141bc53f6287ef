"""The history to score with: the bundle's and the live likes; the outcomes that several sources know of a user.

The rules. A like that the bundle has already (the same item at the same time: the bundle was trained on an export of
the log) is not doubled. Every other like stands where its time says, after stored ones of the same time. One that is
older than the stored tail begins the history if the tail is the whole of it; if there was more before the tail, that
like may be counted in the stored total already, and no window reaches that far: it is left out. The total grows by what
was inserted, and by the likes before the newest ones that are later than the stored history: they stand in no prompt,
but where a window begins depends on their number. A like of an item that the bundle does not know can stand in no
prompt either, and takes no place in the window.

For a deleted user, only likes and outcomes after the deletion are used. What the bundle has of the user is used if all
of it is from after the deletion, which the time of the user's first row proves.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from models.features import MAX_OUTCOMES, UserFeatures
from service.interactions.live import MAX_LIKES, USERS_AT_ONCE, KnownOutcome, Like, LikeRow, LiveUser

NOBODY = LiveUser()
NO_USERS: Mapping[str, LiveUser] = {}
IsKnown = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class MergedUser:
    """A user to score with.

    Attributes:
        features: None for a user without live likes whom the bundle does not know, or who was deleted.
        likes: the number of live likes in the history.
        outcomes: the newest live outcomes, oldest first.
        deleted: True if the user was deleted, and what the bundle has of the user must not be used.
        outside: when the user liked items that the bundle does not know; they are in no history.
        reach: how many of the history's newest entries follow each other; between older ones likes are missing.
    """

    features: UserFeatures | None
    likes: int = 0
    outcomes: tuple[KnownOutcome, ...] = ()
    deleted: bool = False
    outside: tuple[float, ...] = ()
    reach: int | None = None

    @property
    def total(self) -> int:
        """Return how many items the user has liked, known ones or not."""
        return len(self.outside) + (0 if self.features is None else self.features.history_total)

    @property
    def like_times(self) -> Sequence[float]:
        """Return when the newest likes were, of items that the bundle does not know too; oldest first."""
        times = () if self.features is None else self.features.history_times
        return sorted([*times, *self.outside]) if self.outside else times


def everything_known(item_id: str) -> bool:
    """Return True: the catalogue is not asked."""
    return True


async def merge_all(
    user_ids: frozenset[str],
    stored: Mapping[str, UserFeatures],
    shared: Mapping[str, LiveUser] = NO_USERS,
    logged: Mapping[str, LiveUser] = NO_USERS,
    is_known: IsKnown = everything_known,
    elsewhere: Mapping[str, int] | None = None,
    window: int = MAX_LIKES,
) -> dict[str, MergedUser]:
    """Merge what the bundle has of each user with what the servers share and what this server's log has.

    `elsewhere` is how many likes since the bundle were reported to other servers alone. A request of a thousand users
    takes tenths of a second, so other tasks run in between.
    """
    found = {}
    for number, one in enumerate(user_ids, 1):
        live = united(*(source[one] for source in (shared, logged) if one in source))
        lost = (elsewhere or {}).get(one, 0) - (len(live.likes) - len(logged.get(one, NOBODY).likes))
        if lost > 0:
            live = replace(live, more=live.more + lost)
        found[one] = merged(one, stored.get(one), live, is_known, window)
        if number % USERS_AT_ONCE == 0:
            await asyncio.sleep(0)
    return found


def united(*live: LiveUser) -> LiveUser:
    """Join what several sources know of one user: each event and impression once, the latest deletion."""
    if len(live) == 1:
        return live[0]
    likes = tuple(sorted({like.event_id: like for one in live for like in one.likes}.values()))
    deleted_at = max((one.deleted_at for one in live if one.deleted_at is not None), default=None)
    impressions: dict[str, KnownOutcome] = {}
    for outcome in (outcome for one in live for outcome in since_deletion(one.outcomes, deleted_at)):
        other = impressions.setdefault(outcome.impression, outcome)
        if other != outcome:
            # A positive is final, and the earliest time of an impression is when it was shown.
            impressions[outcome.impression] = outcome._replace(
                shown=min(outcome.shown, other.shown), positive=outcome.positive or other.positive
            )
    outcomes = tuple(sorted(impressions.values()))[-MAX_OUTCOMES:]
    return LiveUser(likes, deleted_at, outcomes, *_earlier(live, likes, deleted_at))


def _earlier(
    live: Sequence[LiveUser], likes: Sequence[Like], deleted_at: float | None
) -> tuple[tuple[LikeRow, ...], int]:
    """Return the likes before those of all sources, and the number of those before them, as the longest source says."""
    longest = max(live, key=lambda one: len(one.earlier) + one.more, default=NOBODY)
    named = {like.event_id for like in likes}
    earlier = tuple(
        row for row in longest.earlier if row[1] not in named and (deleted_at is None or row[0] > deleted_at)
    )
    return earlier, longest.more if deleted_at == longest.deleted_at else 0


def since_deletion(outcomes: Iterable[KnownOutcome], deleted_at: float | None) -> tuple[KnownOutcome, ...]:
    """Return the outcomes of impressions shown after the deletion; all of them if there was no deletion."""
    return tuple(one for one in outcomes if deleted_at is None or one.shown > deleted_at)


def merged(
    user_id: str,
    stored: UserFeatures | None,
    live: LiveUser,
    is_known: IsKnown = everything_known,
    window: int = MAX_LIKES,
) -> MergedUser:
    """Return the user to score with, by the rules above.

    `is_known` says which items the bundle knows, and `window` is the number of likes that a prompt may show.
    """
    likes, deleted_at = live.likes, live.deleted_at
    if deleted_at is not None:
        likes = tuple(like for like in likes if like.timestamp > deleted_at)
        stored = stored if stored is not None and stored.may_be_used(deleted_at) else None
    outcomes = since_deletion(live.outcomes, deleted_at)
    user = MergedUser(stored, 0, outcomes, deleted=deleted_at is not None and stored is None)
    if not likes:
        return user
    known = [like for like in likes if is_known(like.item_id)]
    earlier = [row for row in live.earlier if is_known(row[2])]
    shown = earlier[: max(0, window - len(known))]  # in the place of likes of items that nobody knows
    named = (*((row[0], row[2]) for row in live.earlier), *((like.timestamp, like.item_id) for like in likes))
    outside = tuple(liked_at for liked_at, item_id in named if not is_known(item_id))
    known = [*(Like(*row) for row in reversed(shown)), *known]
    return replace(_with_likes(user_id, user, known, len(earlier) - len(shown) + live.more), outside=outside)


def _with_likes(user_id: str, user: MergedUser, likes: Sequence[Like], before: int) -> MergedUser:
    """Return the user with live likes in the history; `before` more stand between it and them."""
    stored = user.features or UserFeatures(user_id, None, (), (), 0)
    known = set(zip(stored.history, stored.history_times, strict=True))
    new = [like for like in likes if (like.item_id, like.timestamp) not in known]
    places = [(_place(like, stored.history_times), like) for like in new]
    whole = stored.history_total == len(stored.history)
    if not whole:
        # At the very time of the tail's first it cannot be told from those before the tail.
        begin = stored.history_times[0] if stored.history_times else float("inf")
        places = [(place, like) for place, like in places if place > 0 and like.timestamp > begin]
    if places:
        history, times = _inserted(stored, places)
        stored = replace(stored, history=history, history_times=times)
    stored = replace(stored, history_total=stored.history_total + len(places) + before) if places or before else stored
    return replace(user, features=stored, likes=len(places), reach=len(places) if before else None)


def _place(like: Like, times: tuple[float, ...]) -> int:
    """Return how many stored likes stand before; their order is the bundle's, whose splits may overlap in time."""
    return next((place for place in range(len(times), 0, -1) if times[place - 1] <= like.timestamp), 0)


def _inserted(stored: UserFeatures, places: list[tuple[int, Like]]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    entries = [
        (index + 1, 0, time, "", item)
        for index, (item, time) in enumerate(zip(stored.history, stored.history_times, strict=True))
    ]
    entries += [(place, 1, like.timestamp, like.event_id, like.item_id) for place, like in places]
    entries.sort()
    return tuple(entry[4] for entry in entries), tuple(entry[2] for entry in entries)
