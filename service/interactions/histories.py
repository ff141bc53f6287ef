"""The history to score with: the bundle's and the live likes; the outcomes that several sources know of a user.

The rules. A like that the bundle has already (the same item at the same time: the bundle was trained on an export of
the log) is not doubled. Every other like stands where its time says, after stored ones of the same time. One that is
older than the stored tail begins the history if the tail is the whole of it; if there was more before the tail, that
like may be counted in the stored total already, and no window reaches that far: it is left out. The total grows by what
was inserted. For a deleted user, only likes and outcomes after the deletion are used, and nothing of the bundle.
"""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from models.features import MAX_OUTCOMES, UserFeatures
from service.interactions.live import USERS_AT_ONCE, KnownOutcome, Like, LiveUser

NOBODY = LiveUser()


@dataclass(frozen=True, slots=True)
class MergedUser:
    """A user to score with.

    Attributes:
        features: None for a user without live likes whom the bundle does not know, or who was deleted.
        likes: the number of live likes in the history.
        outcomes: the newest live outcomes, oldest first.
        deleted: True if the user was deleted; the bundle's outcomes must then not be used.
    """

    features: UserFeatures | None
    likes: int
    outcomes: tuple[KnownOutcome, ...] = ()
    deleted: bool = False


async def merge_all(
    user_ids: frozenset[str], stored: Mapping[str, UserFeatures], *live: Mapping[str, LiveUser]
) -> dict[str, MergedUser]:
    """Merge what the bundle has of each user with what each of several sources has come to know since.

    A request of a thousand users takes tenths of a second, so other tasks run in between.
    """
    found = {}
    for number, one in enumerate(user_ids, 1):
        found[one] = merged(one, stored.get(one), united(*(source[one] for source in live if one in source)))
        if number % USERS_AT_ONCE == 0:
            await asyncio.sleep(0)
    return found


def united(*live: LiveUser) -> LiveUser:
    """Join what several sources know of one user: each event and impression once, the latest deletion."""
    if len(live) == 1:
        return live[0]
    likes = {like.event_id: like for one in live for like in one.likes}
    deleted_at = max((one.deleted_at for one in live if one.deleted_at is not None), default=None)
    impressions: dict[str, KnownOutcome] = {}
    for outcome in (outcome for one in live for outcome in since_deletion(one.outcomes, deleted_at)):
        other = impressions.setdefault(outcome.impression, outcome)
        if other != outcome:
            # A positive is final, and the earliest time of an impression is when it was shown.
            impressions[outcome.impression] = outcome._replace(
                shown=min(outcome.shown, other.shown), positive=outcome.positive or other.positive
            )
    return LiveUser(tuple(sorted(likes.values())), deleted_at, tuple(sorted(impressions.values()))[-MAX_OUTCOMES:])


def since_deletion(outcomes: Iterable[KnownOutcome], deleted_at: float | None) -> tuple[KnownOutcome, ...]:
    """Return the outcomes of impressions shown after the deletion; all of them if there was no deletion."""
    return tuple(one for one in outcomes if deleted_at is None or one.shown > deleted_at)


def merged(user_id: str, stored: UserFeatures | None, live: LiveUser) -> MergedUser:
    """Return the user to score with, by the rules above."""
    features, likes = _with_likes(user_id, stored, live)
    return MergedUser(features, likes, since_deletion(live.outcomes, live.deleted_at), live.deleted_at is not None)


def _with_likes(user_id: str, stored: UserFeatures | None, live: LiveUser) -> tuple[UserFeatures | None, int]:
    likes = live.likes
    if live.deleted_at is not None:
        stored = None
        likes = tuple(like for like in likes if like.timestamp > live.deleted_at)
    if stored is None:
        stored = UserFeatures(user_id, None, (), (), 0)
        if not likes:
            return None, 0
    known = set(zip(stored.history, stored.history_times, strict=True))
    new = [like for like in likes if (like.item_id, like.timestamp) not in known]
    places = [(_place(like, stored.history_times), like) for like in new]
    whole = stored.history_total == len(stored.history)
    if not whole:
        # At the very time of the tail's first it cannot be told from those before the tail.
        begin = stored.history_times[0] if stored.history_times else float("inf")
        places = [(place, like) for place, like in places if place > 0 and like.timestamp > begin]
    if not places:
        return stored, 0
    history, times = _inserted(stored, places)
    total = stored.history_total + len(places)
    return UserFeatures(user_id, stored.vector_C, history, times, total, stored.counts), len(places)


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
