"""Counts of a row's user and item, and the user's newest outcomes, as known at the row.

There are two counts: impressions with a known outcome, and positives among them.

Static: the counts of the train split, the same for every row. Live: all rows of all splits before the row, as in a
service that learns every outcome after a delay. Live counts have no row of the row's own second.

Shapes: B rows of a split, N rows that may be counted, E users or items.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.features import MAX_OUTCOMES, Outcome, Tables
from training.data.dataset import Dataset
from training.data.errors import DataError

Counted = NDArray[np.int64]


@dataclass(frozen=True)
class Counting:
    """Which rows are known at a row: static counts, or live counts after a delay in seconds."""

    live: bool = False
    delay: float = 0.0

    def known(self, dataset: Dataset, split: str) -> tuple[list[str], NDArray[np.float64]]:
        """Return the splits whose rows count, and for each row of `split` the moment before which they count, `(B,)`.

        Rows of train always get live counts: the counts of all of train hold each row's own label.
        """
        times_B = dataset.splits[split]["timestamp"].cast(pl.Float64).to_numpy()
        if not self.live and split != "train":
            return [name for name in dataset.splits if name == "train"], np.full(len(times_B), np.inf)
        # Without a train split the bundle's counts are used, and these already hold valid.
        splits = [name for name in dataset.splits if "train" in dataset.splits or name != "valid"]
        return splits, times_B - self.delay


STATIC, LIVE = Counting(), Counting(live=True)


@dataclass(frozen=True)
class RowCounts:
    """The counts known at every row of a split, `(B,)` each."""

    user_impressions_B: Counted
    user_positives_B: Counted
    item_impressions_B: Counted
    item_positives_B: Counted


def row_counts(dataset: Dataset, split: str, counting: Counting, tables: Tables | None = None) -> RowCounts:
    """Return the counts known at every row of a split.

    If the dataset has no train split, the counts of the bundle's tables are added, as in the service.

    Raises:
        DataError: the split is valid and there is no train split: the bundle's counts hold the labels of valid.
    """
    if split == "valid" and "train" not in dataset.splits:
        raise DataError(
            "valid: the bundle's counts hold its labels; add train to the folder, so that they are left out"
        )
    frame = dataset.splits[split]
    splits, before_B = counting.known(dataset, split)
    columns = ["user_id", "item_id", "label", pl.col("timestamp").cast(pl.Float64)]
    known = pl.concat([frame.select(columns).clear(), *(dataset.splits[name].select(columns) for name in splits)])
    user, item = (_counts(known, frame, column, before_B) for column in ("user_id", "item_id"))
    if "train" not in dataset.splits and tables is not None:
        user = _add(user, _bundle_counts(frame["user_id"], tables.user_ids, tables.user_counts_U2))
        item = _add(item, _bundle_counts(frame["item_id"], tables.item_ids, tables.item_counts_I2))
    return RowCounts(*user, *item)


@dataclass(frozen=True)
class RowOutcomes:
    """The outcomes of the row's user that are known at each row of a split, without those in train.

    Attributes:
        items_N, labels_N, times_N: item ids, labels and times of all outcomes, ordered by user, then by time.
        first_B, end_B: a row's outcomes are `first_B` to `end_B` of these (end excluded).
        stored_B: the bundle's outcomes of the row's user, older than all others; None if they are not used.
    """

    items_N: pl.Series
    labels_N: NDArray[np.bool_]
    times_N: NDArray[np.float64]
    first_B: Counted
    end_B: Counted
    stored_B: Sequence[tuple[Outcome, ...]] | None

    def of(self, row: int) -> tuple[Outcome, ...]:
        """Return the newest outcomes known at a row, oldest first, at most `MAX_OUTCOMES`."""
        known = slice(max(int(self.first_B[row]), int(self.end_B[row]) - MAX_OUTCOMES), int(self.end_B[row]))
        found = map(Outcome, self.items_N[known].to_list(), self.labels_N[known].tolist(), self.times_N[known].tolist())
        stored = () if self.stored_B is None else self.stored_B[row]
        return (*stored, *found)[-MAX_OUTCOMES:]


def row_outcomes(dataset: Dataset, split: str, counting: Counting, tables: Tables) -> RowOutcomes:
    """Return the outcomes known at every row of a split. With static counting, rows of valid and test have none.

    Rows of train are no outcomes: the trained vectors already contain them. If the dataset has no train split, the
    outcomes in the bundle's tables come first, as in the service.
    """
    frame = dataset.splits[split]
    splits, before_B = counting.known(dataset, split)
    columns = ["user_id", "item_id", "label", pl.col("timestamp").cast(pl.Float64)]
    rows = (dataset.splits[name].select(columns) for name in splits if name != "train")
    known = pl.concat([frame.select(columns).clear(), *rows])
    code_N, code_B = _codes(known["user_id"], frame["user_id"])
    times_N, labels_N = known["timestamp"].to_numpy(), known["label"].to_numpy() > 0
    order_N, first_B, end_B = _before(code_N, times_N, code_B, before_B)
    stored_B = None
    if counting.live and "train" not in dataset.splits:
        stored = {one: tables.stored_outcomes(one) for one in frame["user_id"].unique()}
        stored_B = [stored[one] for one in frame["user_id"]]
    return RowOutcomes(known["item_id"][order_N], labels_N[order_N], times_N[order_N], first_B, end_B, stored_B)


def counted_before(
    key_N: Counted,
    label_N: NDArray[np.integer],
    time_N: NDArray[np.float64],
    key_B: Counted,
    before_B: NDArray[np.float64],
) -> tuple[Counted, Counted]:
    """Return for each of B rows how many of N rows have its key and an earlier time, and how many are positive.

    Keys are not negative.
    """
    order_N, first_B, end_B = _before(key_N, time_N, key_B, before_B)
    positives = np.concatenate([[0], np.cumsum(label_N[order_N], dtype=np.int64)])
    return end_B - first_B, positives[end_B] - positives[first_B]


def counts_by_id(frame: pl.DataFrame, column: str) -> pl.DataFrame:
    """Return `impressions` and `positives` of each id of a column."""
    return frame.group_by(column).agg(
        impressions=pl.len().cast(pl.Int64), positives=pl.col("label").cast(pl.Int64).sum()
    )


def _counts(
    known: pl.DataFrame, frame: pl.DataFrame, column: str, before_B: NDArray[np.float64]
) -> tuple[Counted, Counted]:
    code_N, code_B = _codes(known[column], frame[column])
    return counted_before(code_N, known["label"].to_numpy(), known["timestamp"].to_numpy(), code_B, before_B)


def _before(
    key_N: Counted, time_N: NDArray[np.float64], key_B: Counted, before_B: NDArray[np.float64]
) -> tuple[Counted, Counted, Counted]:
    """Return the order of N rows by key, then by time; and, in that order, the first and end of the rows before each B.

    The rows before one of B rows have its key and a time before its `before_B`.
    """
    # One integer orders by key, then by time. It holds the rank of the time, so that nothing is rounded.
    times, rank_N = np.unique(time_N, return_inverse=True)
    place_N = key_N * (len(times) + 1) + rank_N
    order_N = np.argsort(place_N, kind="stable")
    place_N = place_N[order_N]
    first_B = np.searchsorted(place_N, key_B * (len(times) + 1))
    end_B = np.searchsorted(place_N, key_B * (len(times) + 1) + np.searchsorted(times, before_B))
    return order_N, first_B, end_B


def _codes(known: pl.Series, asked: pl.Series) -> tuple[Counted, Counted]:
    """Return codes of the ids in two columns; equal ids have equal codes."""
    distinct = pl.concat([known, asked]).unique(maintain_order=True)
    return _places(known, distinct), _places(asked, distinct)


def _bundle_counts(ids_B: pl.Series, ids: Sequence[str], counts_E2: NDArray[np.integer]) -> tuple[Counted, Counted]:
    # The last row is for ids that the bundle does not know.
    known_E2 = np.concatenate([np.asarray(counts_E2, np.int64), np.zeros((1, 2), np.int64)])
    found_B2 = known_E2[_places(ids_B, pl.Series(list(ids), dtype=pl.String))]
    return found_B2[:, 0], found_B2[:, 1]


def _add(first: tuple[Counted, Counted], second: tuple[Counted, Counted]) -> tuple[Counted, Counted]:
    return first[0] + second[0], first[1] + second[1]


def _places(values: pl.Series, distinct: pl.Series) -> Counted:
    """Return the place of each value among the distinct values; `len(distinct)` for a value that is not there."""
    places = pl.DataFrame({"id": distinct, "place": np.arange(len(distinct), dtype=np.int64)})
    joined = values.alias("id").to_frame().join(places, on="id", how="left", maintain_order="left")
    return joined["place"].fill_null(len(distinct)).to_numpy()
