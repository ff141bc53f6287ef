"""The history of every row of every split: the items that the user liked before the row.

A user's positives (rows with label 1) stand in one fixed order: train, then valid, then test; within a split by
timestamp; equal timestamps in file order. A history is the beginning of that order, so its length defines it.

Two rules set the length:

- **strict** (the default): the longest beginning in which every positive is in the row's own split or an earlier one
  and has a timestamp strictly before the row's. Rows of one user and one second have the same history, in any file
  order. If the splits are cut by time, these are all positives before the row's timestamp. If given splits overlap in
  time, a positive with a later timestamp never counts, and a row never uses a label of a later split.
- **file-order** (the rule of CoLLM's published files): all positives that stand earlier in the fixed order. It counts
  rows of the row's own second that stand earlier in the file. So it can reveal a row's label if a file writes each
  positive before the negatives of its second.

An item that the user liked twice is in the history twice. A candidate that is in its own history stays there: a user
segment must not depend on the candidate, because all candidates of the user share it.

Shapes: B rows of a split, U users, P positives of all users.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from training.data.dataset import Dataset

Int32 = NDArray[np.int32]
Ties = Literal["strict", "file-order"]


@dataclass(frozen=True)
class SplitHistories:
    """The histories of one split's rows, in the rows' order.

    Attributes:
        user_code: [B] the user, an index into `Histories.user_ids`.
        item_row: [B] the candidate, a row of `Dataset.items`.
        length: [B] the history is the first `length` positives of the user.
        rule_matters: [B] whether the two rules for ties give the row different histories.
    """

    user_code: Int32
    item_row: Int32
    length: Int32
    rule_matters: NDArray[np.bool_]


@dataclass(frozen=True)
class Histories:
    """For every interaction of every split, the user's earlier positives.

    Attributes:
        user_ids: [U] the users, by first appearance in train, valid, test.
        ties: the rule that set the lengths.
    """

    user_ids: pl.Series
    ties: Ties
    _splits: Mapping[str, SplitHistories]
    _code_of_user: Mapping[str, int]
    _positives_P: Int32  # rows of items; user by user, oldest first
    _times_P: NDArray[np.float64]  # when, UTC seconds
    _starts: NDArray[np.int64]  # [U + 1] where each user's positives begin
    _lengths_through: Mapping[str, Int32]  # [U] positives of each user up to the end of a split

    def of_split(self, split: str) -> SplitHistories:
        """Return the histories of the rows of one split."""
        return self._splits[split]

    def item_rows(self, split: str) -> Int32:
        """Return, for every row of a split, the row of its item in `Dataset.items`: [B]."""
        return self._splits[split].item_row

    def positives(self, user_id: str) -> Int32:
        """Return the user's positives in all splits as rows of `Dataset.items`, oldest first; none: empty."""
        code = self._code_of_user.get(user_id)
        return self._positives_P[:0] if code is None else self.positives_of(code)

    def positives_of(self, user_code: int) -> Int32:
        """Return the same for a user's code."""
        return self._positives_P[self._starts[user_code] : self._starts[user_code + 1]]

    def times_of(self, user_code: int) -> NDArray[np.float64]:
        """Return when the user liked each of `positives_of`, UTC seconds."""
        return self._times_P[self._starts[user_code] : self._starts[user_code + 1]]

    def history(self, split: str, row: int) -> Int32:
        """Return one row's history as rows of `Dataset.items`, oldest first."""
        rows = self._splits[split]
        return self.positives_of(int(rows.user_code[row]))[: rows.length[row]]

    def delayed(self, split: str, known_before_B: NDArray[np.float64]) -> "Histories":
        """Return histories in which each row of a split has only likes strictly before a moment, UTC seconds.

        A history stays a beginning of the user's likes; it ends before the first that is too late.
        """
        rows = self._splits[split]
        length = rows.length.copy()
        order = np.argsort(rows.user_code, kind="stable")
        for chosen in np.split(order, np.flatnonzero(np.diff(rows.user_code[order])) + 1):
            times = np.maximum.accumulate(self.times_of(int(rows.user_code[chosen[0]])))
            length[chosen] = np.minimum(length[chosen], np.searchsorted(times, known_before_B[chosen]))
        return replace(self, _splits={**self._splits, split: replace(rows, length=length)})

    def last(self, user_id: str, *, through: str | None = None) -> Int32:
        """Return what the user liked up to the end of split `through` (None: of all splits), oldest first."""
        positives = self.positives(user_id)
        if through is None or user_id not in self._code_of_user:
            return positives
        return positives[: self._lengths_through[through][self._code_of_user[user_id]]]


def build_histories(dataset: Dataset, ties: Ties = "strict") -> Histories:
    """Return the histories of every row of every split; the rules stand at the top of this file."""
    rows = pl.concat(
        frame.select("user_id", "item_id", "label", pl.col("timestamp").cast(pl.Float64))
        for frame in dataset.splits.values()
    )
    heights = [frame.height for frame in dataset.splits.values()]
    split_of_row = np.repeat(np.arange(len(heights)), heights)
    user_ids = rows["user_id"].unique(maintain_order=True)
    user_code = _codes(rows["user_id"], user_ids)
    item_row = _codes(rows["item_id"], dataset.items["item_id"])
    label = rows["label"].to_numpy().astype(np.int64)

    timestamp = rows["timestamp"].to_numpy()

    # lexsort is stable, and its last key is the first to sort by: user, split, time, then file order.
    order = np.lexsort((timestamp, split_of_row, user_code))
    positive = order[label[order] == 1]
    per_user = np.bincount(user_code, weights=label, minlength=len(user_ids)).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(per_user)])
    earlier_in_file = np.empty(rows.height, dtype=np.int64)
    earlier_in_file[order] = np.cumsum(label[order]) - label[order] - starts[user_code[order]]

    ends = np.cumsum(heights)
    parts = {name: slice(end - height, end) for name, end, height in zip(dataset.splits, ends, heights, strict=True)}
    through = {
        name: np.bincount(user_code[: part.stop], weights=label[: part.stop], minlength=len(user_ids)).astype(np.int32)
        for name, part in parts.items()
    }
    strictly_before = _strictly_before(user_code, timestamp, positive) - starts[user_code]
    for name, part in parts.items():
        strictly_before[part] = np.minimum(strictly_before[part], through[name][user_code[part]])
    length = (strictly_before if ties == "strict" else earlier_in_file).astype(np.int32)
    rule_matters = strictly_before != earlier_in_file
    return Histories(
        user_ids=user_ids,
        ties=ties,
        _splits={
            name: SplitHistories(user_code[part], item_row[part], length[part], rule_matters[part])
            for name, part in parts.items()
        },
        _code_of_user={user_id: code for code, user_id in enumerate(user_ids)},
        _positives_P=item_row[positive],
        _times_P=timestamp[positive],
        _starts=starts,
        _lengths_through=through,
    )


def _strictly_before(
    user_code: Int32, timestamp: NDArray[np.float64], positive: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return for each row the place in `positive` of its user's first positive that is not before its timestamp.

    `positive` holds the rows with label 1 in the fixed order, user by user.
    """
    times, place = np.unique(timestamp, return_inverse=True)
    key = user_code.astype(np.int64) * len(times) + place  # grows with the user, then with the time
    latest_P = np.maximum.accumulate(key[positive])  # the latest time up to each positive of the user
    return np.searchsorted(latest_P, key).astype(np.int64)


def _codes(values: pl.Series, distinct: pl.Series) -> Int32:
    """Return for each value its place among the distinct ones."""
    places = pl.DataFrame({"id": distinct, "code": np.arange(len(distinct), dtype=np.int32)})
    joined = values.alias("id").to_frame().join(places, on="id", how="left", maintain_order="left")
    return joined["code"].to_numpy().astype(np.int32)
