"""Scores that were served lately, kept so that an outcome finds the score it answers."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from models.features import Floats

UNLABELLED = -1


@dataclass(frozen=True, slots=True)
class ServedScore:
    """One result of an answer: its position (`index` in /score, `rank` in /rank) and what was told."""

    position: int
    user_id: str
    item_id: str
    score: float


@dataclass(slots=True)
class ServedRequest:
    """The results of one answer. `numbers_K` are their places among the bundle's labelled scores."""

    bundle: str
    served_at: float  # monotonic seconds
    positions_K: np.ndarray
    user_ids: Sequence[str]  # of each result, or of all if there is one
    item_ids: Sequence[str]
    scores_K: Floats
    numbers_K: np.ndarray = field(init=False)
    positive_K: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.numbers_K = np.full(len(self.item_ids), UNLABELLED, np.int64)
        self.positive_K = np.zeros(len(self.item_ids), np.bool_)

    def __len__(self) -> int:
        return len(self.item_ids)

    def user_id(self, place: int) -> str:
        """Return the user of a result."""
        return self.user_ids[place if len(self.user_ids) > 1 else 0]

    def place_of(self, position: int) -> int | None:
        """Return where the result with a position stands."""
        [found] = np.nonzero(self.positions_K == position)
        return int(found[0]) if len(found) else None

    def place_of_pair(self, user_id: str, item_id: str) -> int | None:
        """Return where the first result of a user and an item stands."""
        for place, one in enumerate(self.item_ids):
            if one == item_id and self.user_id(place) == user_id:
                return place
        return None


class ServedScores:
    """The latest answers by request id, bounded by their number of scores and by age.

    A score takes about 100 bytes, most of them the item's id. A request id that comes again stands for the later
    answer.
    """

    def __init__(self, most: int, oldest_s: float) -> None:
        self._most = most
        self._oldest_s = oldest_s
        self._requests: OrderedDict[str, ServedRequest] = OrderedDict()  # oldest first
        self.scores = 0

    def add(self, request_id: str, bundle: str, results: Sequence[ServedScore], now: float) -> None:
        """Keep an answer's results; those of the oldest answers leave where there are too many."""
        self._drop(request_id)
        if not results:  # would take memory, and count for nothing where that is bounded
            return
        users = [one.user_id for one in results]
        self._requests[request_id] = ServedRequest(
            bundle=bundle,
            served_at=now,
            positions_K=np.array([one.position for one in results], np.int32),
            user_ids=users[:1] if len(set(users)) == 1 else users,
            item_ids=[one.item_id for one in results],
            scores_K=np.array([one.score for one in results], np.float32),
        )
        self.scores += len(results)
        self.expire(now)

    def find(self, request_id: str, now: float) -> ServedRequest | None:
        """Return the results of an answer, if they are still kept."""
        self.expire(now)
        return self._requests.get(request_id)

    def forget(self, user_id: str) -> None:
        """Drop every answer that holds a result of this user."""
        held = [request_id for request_id, one in self._requests.items() if user_id in one.user_ids]
        for request_id in held:
            self._drop(request_id)

    def expire(self, now: float) -> None:
        """Drop what is too old or too much."""
        while self._requests:
            oldest_id, oldest = next(iter(self._requests.items()))
            if self.scores <= self._most and now - oldest.served_at <= self._oldest_s:
                return
            self._drop(oldest_id)

    def _drop(self, request_id: str) -> None:
        dropped = self._requests.pop(request_id, None)
        if dropped is not None:
            self.scores -= len(dropped)
