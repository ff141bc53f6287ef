from itertools import takewhile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.dataset import Dataset, load_dataset
from training.data.history import Histories, build_histories

MOVIELENS = Path(__file__).parents[4] / "shared" / "data" / "ml-1m"
ITEMS = ["A", "B", "C", "D"]


def dataset(**splits: list[tuple[str, str, int, int]]) -> Dataset:
    """Return a data set from rows (user, item, label, timestamp)."""
    schema = {"user_id": pl.String, "item_id": pl.String, "label": pl.Int8, "timestamp": pl.Int64}
    items = pl.DataFrame({"item_id": ITEMS, "title": ITEMS})
    return Dataset(items, {name: pl.DataFrame(rows, schema, orient="row") for name, rows in splits.items()})


def by_file_order(data: Dataset) -> dict[str, list[list[str]]]:
    """Return each row's history by the rule of the published files, row by row and without any code of the module."""
    liked: dict[str, list[str]] = {}
    histories = {}
    for name, frame in data.splits.items():
        rows = list(enumerate(frame.select("user_id", "item_id", "label", "timestamp").rows()))
        histories[name] = [[""]] * len(rows)
        for place, (user, item, label, _) in sorted(rows, key=lambda row: (row[1][3], row[0])):
            histories[name][place] = list(liked.setdefault(user, []))
            if label:
                liked[user].append(item)
    return histories


def by_strict_time(data: Dataset) -> dict[str, list[list[str]]]:
    """Return each row's history by the strict rule, row by row and without any code of the module."""
    liked: dict[str, list[tuple[int, str]]] = {}  # of the splits so far, in the fixed order
    histories = {}
    for name, frame in data.splits.items():
        rows = frame.select("user_id", "item_id", "label", "timestamp").rows()
        for user, item, label, at in sorted(rows, key=lambda row: row[3]):
            if label:
                liked.setdefault(user, []).append((at, item))
        histories[name] = [
            [item for _, item in takewhile(lambda one, row=row: one[0] < row[3], liked.get(row[0], []))] for row in rows
        ]
    return histories


def as_ids(data: Dataset, histories: Histories, split: str) -> list[list[str]]:
    ids = data.items["item_id"].to_list()
    rows = range(data.splits[split].height)
    return [[ids[item] for item in histories.history(split, row)] for row in rows]


ROWS = st.lists(
    st.tuples(st.sampled_from(["u", "v", "w"]), st.sampled_from(ITEMS), st.integers(0, 1), st.integers(0, 5)),
    max_size=25,
)


@given(train=ROWS, valid=ROWS, test=ROWS)
@settings(deadline=None)
def test_histories_are_those_told_one_row_at_a_time(
    train: list[tuple[str, str, int, int]],
    valid: list[tuple[str, str, int, int]],
    test: list[tuple[str, str, int, int]],
) -> None:
    data = dataset(train=train, valid=valid, test=test)
    strict, published = build_histories(data), build_histories(data, "file-order")
    assert {split: as_ids(data, strict, split) for split in data.splits} == by_strict_time(data)
    assert {split: as_ids(data, published, split) for split in data.splits} == by_file_order(data)
    for split in data.splits:
        differs = strict.of_split(split).length != published.of_split(split).length
        for histories in (strict, published):
            assert histories.of_split(split).rule_matters.tolist() == differs.tolist()


@given(ROWS, st.integers(0, 5))
@settings(deadline=None)
def test_in_splits_cut_by_time_a_history_is_every_positive_before_the_row(
    rows: list[tuple[str, str, int, int]], cut: int
) -> None:
    early, late = [row for row in rows if row[3] < cut], [row for row in rows if row[3] >= cut]
    data = dataset(train=early, valid=late)
    histories = build_histories(data)
    for split, part in (("train", early), ("valid", late)):
        expected = [
            sorted(item for user, item, label, at in rows if label and user == one[0] and at < one[3]) for one in part
        ]
        assert [sorted(ids) for ids in as_ids(data, histories, split)] == expected


def test_a_sampled_negative_of_the_same_second_has_the_history_of_its_positive() -> None:
    """Random items, a negative behind each positive: by file order the history's length alone tells the labels."""
    rng = np.random.default_rng(0)
    pairs = [
        (f"u{rng.integers(5)}", ITEMS[rng.integers(len(ITEMS))], label, second)
        for second in range(200)
        for label in (1, 0)
    ]
    pairs = [(pairs[place - place % 2][0], *row[1:]) for place, row in enumerate(pairs)]
    data, turned = dataset(train=pairs[:300], valid=pairs[300:]), dataset(train=pairs[299::-1], valid=pairs[:299:-1])
    for split in data.splits:
        histories = as_ids(data, build_histories(data), split)
        assert histories[0::2] == histories[1::2]
        assert as_ids(turned, build_histories(turned), split) == histories[::-1]
        published = build_histories(data, "file-order").of_split(split).length
        assert (published[1::2] == published[0::2] + 1).all()


def test_a_history_holds_nothing_of_the_rows_second_and_nothing_later_whatever_split_it_is_in() -> None:
    data = dataset(
        train=[("u", "B", 1, 9), ("u", "C", 1, 5), ("u", "A", 1, 9)],
        valid=[("u", "D", 1, 1), ("u", "D", 0, 0), ("u", "A", 0, 6), ("u", "B", 0, 10)],
    )
    histories = build_histories(data)
    assert as_ids(data, histories, "train") == [["C"], [], ["C"]]
    assert as_ids(data, histories, "valid") == [[], [], ["C"], ["C", "B", "A", "D"]]


def test_by_file_order_a_split_follows_the_one_before_whatever_its_timestamps_say() -> None:
    data = dataset(
        train=[("u", "B", 1, 9), ("u", "C", 1, 5), ("u", "A", 1, 9)],
        valid=[("u", "D", 1, 1), ("u", "D", 0, 0)],
    )
    histories = build_histories(data, "file-order")
    assert as_ids(data, histories, "train") == [["C"], [], ["C", "B"]]
    assert as_ids(data, histories, "valid") == [["C", "B", "A"], ["C", "B", "A"]]


def test_times_stand_beside_the_likes_they_are_of_in_the_users_own_order() -> None:
    data = dataset(
        train=[("u", "B", 1, 9), ("v", "D", 1, 3), ("u", "C", 1, 5), ("u", "A", 0, 7)],
        valid=[("u", "D", 1, 1)],
    )
    histories = build_histories(data)
    assert [histories.times_of(code).tolist() for code in range(2)] == [[5.0, 9.0, 1.0], [3.0]]
    assert [len(histories.positives_of(code)) for code in range(2)] == [3, 1]


def test_repeats_and_the_candidate_itself_stay_in_the_history() -> None:
    data = dataset(train=[("u", "A", 1, 1), ("u", "A", 1, 2), ("u", "A", 0, 3)])
    assert as_ids(data, build_histories(data), "train") == [[], ["A"], ["A", "A"]]


def test_last_history_ends_with_the_split_asked_for() -> None:
    data = dataset(train=[("u", "A", 1, 1), ("v", "B", 0, 1)], valid=[("u", "B", 1, 2)], test=[("w", "C", 1, 3)])
    histories = build_histories(data)
    last = {through: histories.last("u", through=through).tolist() for through in ("train", "valid", None)}
    assert last == {"train": [0], "valid": [0, 1], None: [0, 1]}
    assert histories.last("v").tolist() == []
    assert histories.last("w", through="valid").tolist() == []
    assert histories.last("w").tolist() == [2]


def test_unknown_users_have_no_positives() -> None:
    histories = build_histories(dataset(train=[("u", "A", 1, 1)]))
    assert histories.positives("nobody").tolist() == []
    assert histories.last("nobody", through="train").tolist() == []


def test_rows_map_to_items_and_users() -> None:
    data = dataset(train=[("v", "D", 1, 9), ("u", "A", 0, 1)], valid=[("u", "C", 1, 0)])
    histories = build_histories(data)
    assert histories.item_rows("train").tolist() == [3, 0]
    assert histories.user_ids.to_list() == ["v", "u"]
    assert histories.of_split("valid").user_code.tolist() == [1]
    for array in (histories.item_rows("train"), histories.positives("v"), histories.of_split("train").length):
        assert array.dtype == np.int32


def test_movielens_histories_are_those_told_one_row_at_a_time() -> None:
    if not MOVIELENS.is_dir():
        pytest.skip(f"MovieLens-1M is not at {MOVIELENS}")
    data = load_dataset(MOVIELENS)
    expected = by_file_order(data)
    assert sum(map(len, expected.values())) == 33_891 + 10_401
    published = build_histories(data, "file-order")
    assert {split: as_ids(data, published, split) for split in data.splits} == expected
    strict = build_histories(data)
    assert {split: as_ids(data, strict, split) for split in data.splits} == by_strict_time(data)
