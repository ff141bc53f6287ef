"""The summary of a data set that `fit` prints before it trains."""

from dataclasses import dataclass

import polars as pl

from training.data.dataset import Dataset
from training.data.history import Histories


@dataclass(frozen=True)
class SplitSummary:
    """One split in numbers.

    Attributes:
        positives: share of rows with label 1; all shares and times are `None` if the split has no rows.
        new_users: share of rows whose user is not in train; `None` for train, as is `new_items`.
        new_items: share of rows whose item is not in train.
        tied: rows that share user and timestamp with another row of any split.
        rule_matters: rows to which the two rules for ties give different histories.
        first: the earliest timestamp, UTC seconds.
        last: the latest.
    """

    name: str
    rows: int
    users: int
    items: int
    positives: float | None
    new_users: float | None
    new_items: float | None
    tied: int
    rule_matters: int
    first: float | None
    last: float | None


@dataclass(frozen=True)
class DataSummary:
    """A data set in numbers.

    Attributes:
        splits: in the data set's order.
        items: how many items the catalogue has.
        titles_cleaned: how many titles changed on reading (docs/data.md).
    """

    splits: list[SplitSummary]
    items: int
    titles_cleaned: int


def summarize(dataset: Dataset, histories: Histories) -> DataSummary:
    """Return the summary of a data set; `histories` are its histories, by either rule for ties."""
    moments = pl.concat(
        frame.select("user_id", pl.col("timestamp").cast(pl.Float64), split=pl.lit(name))
        for name, frame in dataset.splits.items()
    )
    shared = moments.filter(pl.struct("user_id", "timestamp").is_duplicated())["split"]
    train = dataset.splits.get("train")
    splits = []
    for name, frame in dataset.splits.items():
        known = None if name == "train" else train
        first, last = frame["timestamp"].min(), frame["timestamp"].max()
        splits.append(
            SplitSummary(
                name=name,
                rows=frame.height,
                users=frame["user_id"].n_unique(),
                items=frame["item_id"].n_unique(),
                positives=_share(frame["label"] == 1),
                new_users=_unseen(frame, known, "user_id"),
                new_items=_unseen(frame, known, "item_id"),
                tied=int((shared == name).sum()),
                rule_matters=int(histories.of_split(name).rule_matters.sum()),
                first=None if first is None else float(first),  # type: ignore[arg-type]  # a number, to polars any type
                last=None if last is None else float(last),  # type: ignore[arg-type]
            )
        )
    return DataSummary(splits, dataset.items.height, dataset.titles_cleaned)


def _unseen(frame: pl.DataFrame, train: pl.DataFrame | None, column: str) -> float | None:
    return None if train is None else _share(~frame[column].is_in(train[column].unique().implode()))


def _share(chosen: pl.Series) -> float | None:
    return int(chosen.sum()) / len(chosen) if len(chosen) else None
