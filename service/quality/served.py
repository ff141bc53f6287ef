"""Scores that were served lately, kept so that an outcome finds the score it answers."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from models.features import Floats

UNLABELLED = -1
_Name = tuple[str, str | None]  # a request id and the user of all results, None where there are several


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
    """The latest answers by request id and user, bounded by their number of scores and by age.

    A score takes about 100 bytes, most of them the item's id. Clients choose request ids and may use one for every
    request: answers to two users are told apart, and of one user the later answer stands.
    """

    def __init__(self, most: int, oldest_s: float) -> None:
        self._most = most
        self._oldest_s = oldest_s
        self._requests: OrderedDict[_Name, ServedRequest] = OrderedDict()  # oldest first
        self._latest: dict[str, _Name] = {}
        self.scores = 0

    def add(self, request_id: str, bundle: str, results: Sequence[ServedScore], now: float) -> None:
        """Keep an answer's results; those of the oldest answers leave where there are too many."""
        if not results:  # would take memory, and count for nothing where that is bounded
            self._drop(self._latest.get(request_id))
            return
        users = [one.user_id for one in results]
        users = users[:1] if len(set(users)) == 1 else users
        name = request_id, users[0] if len(users) == 1 else None
        self._drop(name)
        self._latest[request_id] = name
        self._requests[name] = ServedRequest(
            bundle=bundle,
            served_at=now,
            positions_K=np.array([one.position for one in results], np.int32),
            user_ids=users,
            item_ids=[one.item_id for one in results],
            scores_K=np.array([one.score for one in results], np.float32),
        )
        self.scores += len(results)
        self.expire(now)

    def find(self, request_id: str, now: float, user_id: str | None = None) -> ServedRequest | None:
        """Return the results of an answer, if they are still kept: the user's, or else the latest of the id."""
        self.expire(now)
        latest = self._latest.get(request_id)
        for name in ((request_id, user_id), (request_id, None), latest):
            if name is not None and name in self._requests:
                return self._requests[name]
        return None

    def forget(self, user_id: str) -> None:
        """Drop every answer that holds a result of this user."""
        held = [name for name, one in self._requests.items() if user_id in one.user_ids]
        for name in held:
            self._drop(name)

    def expire(self, now: float) -> None:
        """Drop what is too old or too much."""
        while self._requests:
            oldest_name, oldest = next(iter(self._requests.items()))
            if self.scores <= self._most and now - oldest.served_at <= self._oldest_s:
                return
            self._drop(oldest_name)

    def _drop(self, name: _Name | None) -> None:
        dropped = None if name is None else self._requests.pop(name, None)
        if dropped is not None and name is not None:
            self.scores -= len(dropped)
            if self._latest.get(name[0]) == name:
                del self._latest[name[0]]
