import polars as pl
import pytest

from training.data.dataset import Dataset
from training.data.history import build_histories
from training.data.summary import SplitSummary, summarize


def dataset(**splits: list[tuple[str, str, int, float]]) -> Dataset:
    """Return a data set from rows (user, item, label, timestamp)."""
    schema = {"user_id": pl.String, "item_id": pl.String, "label": pl.Int8, "timestamp": pl.Float64}
    items = pl.DataFrame({"item_id": ["A", "B", "C", "D"], "title": ["a", "b", "c", "d"]})
    frames = {name: pl.DataFrame(rows, schema, orient="row") for name, rows in splits.items()}
    return Dataset(items, frames, titles_cleaned=3)


def test_a_data_set_is_counted_by_split() -> None:
    data = dataset(
        train=[("u", "A", 1, 5.0), ("u", "B", 0, 5.0), ("v", "A", 1, 5.0), ("u", "C", 0, 7.5)],
        valid=[("u", "D", 1, 9.0), ("w", "A", 1, 8.0), ("w", "D", 1, 8.0), ("w", "B", 0, 20.0), ("u", "A", 0, 10.0)],
    )
    summary = summarize(data, build_histories(data))
    assert (summary.items, summary.titles_cleaned) == (4, 3)
    train, valid = summary.splits
    assert train == SplitSummary("train", 4, 2, 3, 0.5, None, None, tied=2, rule_matters=1, first=5.0, last=7.5)
    assert valid == SplitSummary("valid", 5, 2, 3, 0.6, 0.6, 0.4, tied=2, rule_matters=1, first=8.0, last=20.0)


def test_rows_tied_over_two_splits_count_in_both() -> None:
    data = dataset(train=[("u", "A", 1, 5.0)], valid=[("u", "B", 0, 5.0)])
    summary = summarize(data, build_histories(data, "file-order"))
    assert [split.tied for split in summary.splits] == [1, 1]
    assert [split.rule_matters for split in summary.splits] == [0, 1]


@pytest.mark.parametrize("column", ["positives", "new_users", "new_items", "first", "last"])
def test_a_split_without_rows_has_no_shares_and_no_times(column: str) -> None:
    data = dataset(train=[("u", "A", 1, 5.0)], valid=[])
    [_, valid] = summarize(data, build_histories(data)).splits
    assert valid.rows == 0 and getattr(valid, column) is None


def test_without_train_nothing_is_said_of_new_users() -> None:
    data = dataset(test=[("u", "A", 1, 5.0)])
    [test] = summarize(data, build_histories(data)).splits
    assert test.new_users is None and test.new_items is None
