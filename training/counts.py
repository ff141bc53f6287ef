"""What is counted of a row's user and item before the row: impressions with a known outcome, and positives.

Static: the counts of the train split, for every row alike. Live: all rows of all splits that came before the row, as a
service counts that is told every outcome after a delay. Rows of the same second as the row never count.

Shapes: B rows of a split, N rows of all splits, E users or items.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.features import Tables
from training.data.dataset import Dataset

Counted = NDArray[np.int64]


@dataclass(frozen=True)
class RowCounts:
    """The counts known at every row of a split, `(B,)` each."""

    user_impressions_B: Counted
    user_positives_B: Counted
    item_impressions_B: Counted
    item_positives_B: Counted


def static_counts(dataset: Dataset, split: str, tables: Tables | None = None) -> RowCounts:
    """Return the counts of the dataset's train split; those of a bundle's tables where it has no train split.

    Rows of train itself are counted live: the counts of all of train hold each row's own label.
    """
    if split == "train":
        return live_counts(dataset, split, tables)
    frame = dataset.splits[split]
    if "train" not in dataset.splits:
        return RowCounts(*_bundle_counts(frame, "user", tables), *_bundle_counts(frame, "item", tables))
    train = dataset.splits["train"]
    return RowCounts(*_total(train, frame, "user_id"), *_total(train, frame, "item_id"))


def live_counts(dataset: Dataset, split: str, tables: Tables | None = None, delay: float = 0.0) -> RowCounts:
    """Return the counts of all rows of all splits earlier than each row's timestamp minus `delay` seconds.

    Without a train split in the dataset the bundle's counts come first, as in the service.
    """
    everything = pl.concat(
        frame.select("user_id", "item_id", "label", pl.col("timestamp").cast(pl.Float64))
        for frame in dataset.splits.values()
    )
    frame = dataset.splits[split]
    before_B = frame["timestamp"].cast(pl.Float64).to_numpy() - delay
    user = _earlier(everything, frame, "user_id", before_B)
    item = _earlier(everything, frame, "item_id", before_B)
    if "train" not in dataset.splits:
        user = _add(user, _bundle_counts(frame, "user", tables))
        item = _add(item, _bundle_counts(frame, "item", tables))
    return RowCounts(*user, *item)


def counts_by_id(frame: pl.DataFrame, column: str) -> pl.DataFrame:
    """Return `impressions` and `positives` of each id of a column."""
    return frame.group_by(column).agg(
        impressions=pl.len().cast(pl.Int64), positives=pl.col("label").cast(pl.Int64).sum()
    )


def _earlier(
    rows: pl.DataFrame, frame: pl.DataFrame, column: str, before_B: NDArray[np.float64]
) -> tuple[Counted, Counted]:
    """Return how many of `rows` with the same id lie before each moment, and how many of them are positive."""
    codes = rows[column].unique(maintain_order=True)
    code_N, code_B = _codes(rows[column], codes), _codes(frame[column], codes)
    # One integer orders by id, then by time; times enter by their rank, so that nothing is rounded.
    times, rank_N = np.unique(rows["timestamp"].to_numpy(), return_inverse=True)
    key_N = code_N * (len(times) + 1) + rank_N
    order = np.argsort(key_N, kind="stable")
    key_N = key_N[order]
    positives = np.concatenate([[0], np.cumsum(rows["label"].to_numpy()[order], dtype=np.int64)])
    first = np.searchsorted(key_N, code_B * (len(times) + 1))
    end = np.searchsorted(key_N, code_B * (len(times) + 1) + np.searchsorted(times, before_B))
    return end - first, positives[end] - positives[first]


def _total(train: pl.DataFrame, frame: pl.DataFrame, column: str) -> tuple[Counted, Counted]:
    joined = frame.select(column).join(counts_by_id(train, column), on=column, how="left", maintain_order="left")
    return joined["impressions"].fill_null(0).to_numpy(), joined["positives"].fill_null(0).to_numpy()


def _bundle_counts(frame: pl.DataFrame, kind: str, tables: Tables | None) -> tuple[Counted, Counted]:
    if tables is None:
        nothing = np.zeros(frame.height, np.int64)
        return nothing, nothing
    ids, counts_E2 = (
        (tables.user_ids, tables.user_counts_U2) if kind == "user" else (tables.item_ids, tables.item_counts_I2)
    )
    # The last row is that of an id that the bundle does not know.
    known_E2 = np.concatenate([np.asarray(counts_E2, np.int64), np.zeros((1, 2), np.int64)])
    places = pl.DataFrame({"id": pl.Series(list(ids), dtype=pl.String), "place": np.arange(len(ids), dtype=np.int64)})
    joined = frame[f"{kind}_id"].alias("id").to_frame().join(places, on="id", how="left", maintain_order="left")
    found_B2 = known_E2[joined["place"].fill_null(len(ids)).to_numpy()]
    return found_B2[:, 0], found_B2[:, 1]


def _add(first: tuple[Counted, Counted], second: tuple[Counted, Counted]) -> tuple[Counted, Counted]:
    return first[0] + second[0], first[1] + second[1]


def _codes(values: pl.Series, distinct: pl.Series) -> Counted:
    """Return for each value its place among the distinct ones, all of which hold it."""
    places = pl.DataFrame({"id": distinct, "code": np.arange(len(distinct), dtype=np.int64)})
    joined = values.alias("id").to_frame().join(places, on="id", how="left", maintain_order="left")
    return joined["code"].to_numpy()
