"""What is known of users and items, and the bundle's own tables of it.

Shapes: U users, I items, C = d_C, D = d_L.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from models.cold import TextMap, UserPrior
from models.fusion import Counts

Floats = NDArray[np.float32]
NO_COUNTS = Counts()
MAX_OUTCOMES = 100  # only the newest outcomes update a user's vector: this limits the time of the solve in a request


class Outcome(NamedTuple):
    """The known outcome of an impression."""

    item_id: str
    positive: bool
    shown: float  # UTC seconds


@dataclass(frozen=True, slots=True)
class Evidence:
    """The outcomes of a user that are not in the trained vector, oldest first.

    Attributes:
        impressions: the number of train impressions in the trained vector; 0 for a user without training.
        positives: the ids of the items with a positive outcome.
        items_HC: stage 2's vectors of the outcomes' items.
        labels_H: 1 for a positive outcome, 0 for a negative one.
        times_H: when each item was shown, UTC seconds.
    """

    impressions: int
    positives: frozenset[str]
    items_HC: Floats
    labels_H: Floats
    times_H: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class UserFeatures:
    """A user as the tables hold one. `vector_C` is None for a user without training data."""

    user_id: str
    vector_C: Floats | None
    history: tuple[str, ...]  # last liked item ids, oldest first, at most the template's window
    history_times: tuple[float, ...]  # when each of them was liked, UTC seconds
    history_total: int  # how many liked items the user has had in all
    counts: Counts = NO_COUNTS  # of all rows of the bundle's data
    since: float = -math.inf  # when the first row that the bundle learned from was, UTC seconds

    def may_be_used(self, deleted_at: float) -> bool:
        """Return whether all that the bundle has of the user is from after a deletion, UTC seconds.

        Training drops the rows up to a deletion that it knows. The time of the first row proves it, whatever the
        training knew: nothing of the user's rows before it is in the bundle.
        """
        return self.since > deleted_at


class HistoryItem(Protocol):
    """What a prompt needs of an item in a history: not the vectors that stand behind a candidate's slots."""

    @property
    def item_id(self) -> str:
        """The item's canonical id."""
        ...

    @property
    def title(self) -> str:
        """The catalogue's title."""
        ...

    @property
    def fold_C(self) -> Floats:  # noqa: N802
        """Stage 2's vector, for folding users in."""
        ...


@dataclass(frozen=True, slots=True)
class ItemFeatures:
    """An item ready for a prompt. Items without training data carry vectors mapped from their text."""

    item_id: str
    title: str
    collab_C: Floats  # behind <Item_ID>
    fold_C: Floats  # stage 2's vector, for folding users in
    semantic_D: Floats  # behind <Warm_ID>
    trained: bool
    counts: Counts = NO_COUNTS  # of all rows of the bundle's data


@dataclass(frozen=True)
class Tables:
    """Every user and item of a bundle, looked up by id."""

    user_ids: Sequence[str]
    item_ids: Sequence[str]
    titles: Sequence[str]
    user_trained_U: NDArray[np.bool_]
    item_trained_I: NDArray[np.bool_]
    histories: Sequence[tuple[str, ...]]
    history_times: Sequence[tuple[float, ...]]
    history_totals: Sequence[int]
    outcomes: Sequence[tuple[Outcome, ...]]  # the newest `MAX_OUTCOMES` of valid and test, oldest first
    train_impressions_U: NDArray[np.int64]
    user_since_U: NDArray[np.float64]  # when the first row of each user was, UTC seconds
    user_counts_U2: NDArray[np.int64]  # impressions and positives of all rows of the bundle's data
    item_counts_I2: NDArray[np.int64]
    user_vectors_UC: Floats
    item_vectors_IC: Floats
    fold_vectors_IC: Floats
    semantic_ID: Floats
    prior: UserPrior
    text_map: TextMap
    _user_rows: dict[str, int] = field(init=False, repr=False)
    _item_rows: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_user_rows", {one: row for row, one in enumerate(self.user_ids)})
        object.__setattr__(self, "_item_rows", {one: row for row, one in enumerate(self.item_ids)})

    def user(self, user_id: str) -> UserFeatures | None:
        """Return a user, or None if the bundle has never heard of them."""
        row = self._user_rows.get(user_id)
        if row is None:
            return None
        vector = np.asarray(self.user_vectors_UC[row]) if self.user_trained_U[row] else None
        return UserFeatures(
            user_id,
            vector,
            tuple(self.histories[row]),
            tuple(self.history_times[row]),
            int(self.history_totals[row]),
            Counts(*self.user_counts_U2[row].tolist()),
            float(self.user_since_U[row]),
        )

    def history_end(self, user_id: str, deleted_at: float | None) -> float:
        """Return when the newest like in a user's stored history was, UTC seconds; -inf if there is none to use."""
        row = self._user_rows.get(user_id)
        if row is None or (deleted_at is not None and not self.user_since_U[row] > deleted_at):
            return -math.inf
        return max(self.history_times[row], default=-math.inf)

    def has_item(self, item_id: str) -> bool:
        """Return whether an item is in the catalogue."""
        return item_id in self._item_rows

    def item(self, item_id: str) -> ItemFeatures | None:
        """Return an item of the catalogue, or None."""
        row = self._item_rows.get(item_id)
        if row is None:
            return None
        return ItemFeatures(
            item_id,
            self.titles[row],
            np.asarray(self.item_vectors_IC[row]),
            np.asarray(self.fold_vectors_IC[row]),
            np.asarray(self.semantic_ID[row]),
            bool(self.item_trained_I[row]),
            Counts(*self.item_counts_I2[row].tolist()),
        )

    def stored_outcomes(self, user_id: str) -> tuple[Outcome, ...]:
        """Return a user's newest `MAX_OUTCOMES` stored outcomes, oldest first; none for an unknown user."""
        row = self._user_rows.get(user_id)
        return () if row is None else tuple(self.outcomes[row])

    def evidence(self, user_id: str, outcomes: Sequence[Outcome]) -> Evidence:
        """Return the evidence in a user's newest `MAX_OUTCOMES` outcomes; items outside the catalogue are left out.

        `outcomes` are ordered, oldest first.
        """
        row = self._user_rows.get(user_id)
        known = [one for one in outcomes[-MAX_OUTCOMES:] if one.item_id in self._item_rows]
        return Evidence(
            impressions=0 if row is None else int(self.train_impressions_U[row]),
            positives=frozenset(one.item_id for one in known if one.positive),
            items_HC=np.asarray(self.fold_vectors_IC[[self._item_rows[one.item_id] for one in known]]),
            labels_H=np.array([one.positive for one in known], np.float32),
            times_H=np.array([one.shown for one in known], np.float64),
        )

    def unseen_item(self, item_id: str, title: str, semantic_D: Floats) -> ItemFeatures:
        """Return an item outside the catalogue, from its title's distilled vector alone."""
        mapped = self.text_map(semantic_D[None])[0]
        return ItemFeatures(item_id, title, mapped, mapped, semantic_D, trained=False)
