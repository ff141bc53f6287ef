from dataclasses import astuple

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.cold import TextMap, UserPrior
from models.features import MAX_OUTCOMES, Outcome, Tables
from training.counts import LIVE, STATIC, Counting, RowCounts, row_counts, row_outcomes
from training.data.dataset import Dataset

# Few users, items and seconds: most draws hold rows of one second, within a split and across splits.
row = st.tuples(st.integers(0, 2), st.integers(0, 2), st.booleans(), st.integers(0, 6))
split = st.lists(row, min_size=1, max_size=12)


def frame(rows: list[tuple[int, int, bool, float]]) -> pl.DataFrame:
    users, items, labels, times = zip(*rows, strict=True)
    return pl.DataFrame(
        {
            "user_id": [f"u{one}" for one in users],
            "item_id": [f"m{one}" for one in items],
            "label": pl.Series(labels, dtype=pl.Boolean).cast(pl.Int8),
            "timestamp": times,
            "weight": pl.Series([1.0] * len(rows), dtype=pl.Float32),
        }
    )


def dataset(**splits: list[tuple[int, int, bool, float]]) -> Dataset:
    items = pl.DataFrame({"item_id": ["m0", "m1", "m2"], "title": ["a", "b", "c"]})
    return Dataset(items, {name: frame(rows) for name, rows in splits.items()})


def columns(counts: RowCounts) -> list[list[int]]:
    return [one.tolist() for one in astuple(counts)]


def counted(data: Dataset, split: str, known: list[list[dict[str, object]]]) -> list[list[int]]:
    """Return the four columns by counting, for every row, the rows that are known at it, one by one."""
    found: list[list[int]] = [[], [], [], []]
    for one, rows in zip(data.splits[split].iter_rows(named=True), known, strict=True):
        for place, column in ((0, "user_id"), (2, "item_id")):
            same = [other["label"] for other in rows if other[column] == one[column]]
            found[place].append(len(same))
            found[place + 1].append(sum(same))  # type: ignore[arg-type]
    return found


datasets = st.builds(dataset, train=split, valid=split, test=split)


@settings(max_examples=200, deadline=None)
@given(datasets, st.sampled_from([0.0, 0.5, 1.0, 2.0, 100.0]), st.sampled_from(["train", "valid", "test"]))
def test_live_counts_are_the_rows_strictly_earlier_than_the_delay(data: Dataset, delay: float, name: str) -> None:
    everything = [one for part in data.splits.values() for one in part.iter_rows(named=True)]
    known = [
        [other for other in everything if other["timestamp"] < one["timestamp"] - delay]
        for one in data.splits[name].iter_rows(named=True)
    ]
    assert columns(row_counts(data, name, Counting(live=True, delay=delay))) == counted(data, name, known)


def tables_with(outcomes: dict[str, tuple[Outcome, ...]]) -> Tables:
    """Return tables that hold only users with these outcomes."""
    nothing = np.zeros((len(outcomes), 1), np.float32)
    ids, zeros = list(outcomes), np.zeros(len(outcomes), np.int64)
    no_items = np.zeros((0, 1), np.float32)
    prior = UserPrior(nothing[0], np.eye(1, dtype=np.float32), 1.0, 1.0, 1.0, 1.0)
    text_map = TextMap(np.zeros(1, np.float32), np.zeros((1, 1), np.float32), np.zeros(1, np.float32))
    return Tables(
        ids, [], [], zeros > 0, np.zeros(0, bool), [()] * len(ids), [()] * len(ids), [0] * len(ids),
        list(outcomes.values()), zeros, zeros.astype(float), np.zeros((len(ids), 2), np.int64),
        np.zeros((0, 2), np.int64),
        nothing, no_items, no_items, no_items, prior, text_map,
    )  # fmt: skip


STORED = tables_with({"u0": (Outcome("m2", True, -2.0), Outcome("m1", False, -1.0)), "u1": (), "u2": ()})


@settings(max_examples=200, deadline=None)
@given(datasets, st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from(["train", "valid", "test"]))
def test_known_outcomes_are_the_users_rows_of_the_counts_without_train(data: Dataset, delay: float, name: str) -> None:
    counting = Counting(live=True, delay=delay)
    found = row_outcomes(data, name, counting, STORED)
    later = [one for part in ("valid", "test") for one in data.splits[part].iter_rows(named=True)]
    for place, one in enumerate(data.splits[name].iter_rows(named=True)):
        known = [
            other
            for other in sorted(later, key=lambda other: other["timestamp"])
            if other["user_id"] == one["user_id"] and other["timestamp"] < one["timestamp"] - delay
        ]
        assert found.of(place) == tuple(
            Outcome(other["item_id"], bool(other["label"]), other["timestamp"]) for other in known
        )


def test_static_counts_know_no_outcomes() -> None:
    rows = [(0, 0, True, 1.0), (0, 1, True, 5.0)]
    for splits in ({"train": rows, "test": rows}, {"test": rows}):
        assert row_outcomes(dataset(**splits), "test", STATIC, STORED).of(1) == ()


def test_without_train_the_bundles_outcomes_come_first_and_valid_is_among_them() -> None:
    data = dataset(valid=[(0, 0, True, 1.0)], test=[(0, 0, False, 3.0), (0, 1, True, 5.0), (1, 1, True, 5.0)])
    found = row_outcomes(data, "test", LIVE, STORED)
    assert found.of(1) == (Outcome("m2", True, -2.0), Outcome("m1", False, -1.0), Outcome("m0", False, 3.0))
    assert found.of(2) == ()


def test_the_bundles_outcomes_are_read_once_for_each_user(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(Tables, "stored_outcomes", lambda self, user_id: read.append(user_id) or ())
    row_outcomes(dataset(test=[(row % 2, 0, True, float(row)) for row in range(9)]), "test", LIVE, STORED)
    assert sorted(read) == ["u0", "u1"]


def test_the_newest_outcomes_are_kept() -> None:
    rows = [(0, second % 3, second % 2 == 0, float(second)) for second in range(MAX_OUTCOMES + 30)]
    found = row_outcomes(dataset(test=rows), "test", LIVE, STORED).of(len(rows) - 1)
    newest = rows[-1 - MAX_OUTCOMES : -1]
    assert found == tuple(Outcome(f"m{item}", label, shown) for _, item, label, shown in newest)


@settings(max_examples=100, deadline=None)
@given(split, split)
def test_static_counts_are_all_of_train_for_every_row(
    train: list[tuple[int, int, bool, float]], valid: list[tuple[int, int, bool, float]]
) -> None:
    data = dataset(train=train, valid=valid)
    everything = list(data.splits["train"].iter_rows(named=True))
    assert columns(row_counts(data, "valid", STATIC)) == counted(data, "valid", [everything] * len(valid))


def test_rows_of_train_never_count_their_own_label() -> None:
    data = dataset(train=[(0, 0, True, 1), (0, 1, True, 2), (0, 0, False, 2)])
    assert columns(row_counts(data, "train", STATIC)) == [[0, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]]


def test_fractions_of_a_second_are_told_apart() -> None:
    data = dataset(train=[(0, 0, True, 1700000000.25)], test=[(0, 0, True, 1700000000.5), (0, 1, True, 1700000000.25)])
    assert row_counts(data, "test", LIVE).user_impressions_B.tolist() == [2, 0]


@pytest.mark.timeout(60)
def test_a_million_rows_are_counted_in_seconds() -> None:
    rng = np.random.default_rng(0)
    rows = 1_000_000
    whole = pl.DataFrame(
        {
            "user_id": pl.Series(rng.integers(0, 100_000, rows)).cast(pl.String),
            "item_id": pl.Series(rng.integers(0, 20_000, rows)).cast(pl.String),
            "label": pl.Series(rng.integers(0, 2, rows)).cast(pl.Int8),
            "timestamp": rng.integers(0, 10_000_000, rows),
        }
    )
    data = Dataset(pl.DataFrame(), {"train": whole})
    counts = row_counts(data, "train", LIVE)
    # Of two rows of an item at most one counts the other.
    rows_I = whole["item_id"].value_counts()["count"].to_numpy()
    assert 0 <= (rows_I * (rows_I - 1) // 2).sum() - counts.item_impressions_B.sum() < 100
