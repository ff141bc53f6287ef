from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from training.data.dataset import DataError, load_dataset, require_learnable
from training.data.split import SplitRule
from training.data.tables import parse_columns

DataFolder = Callable[..., Path]
HEADER = "user_id,item_id,label,timestamp\n"


def refusal(folder: Path, **options: Any) -> str:
    """Return the message with which a folder is refused."""
    with pytest.raises(DataError) as raised:
        load_dataset(folder, **options)
    message = str(raised.value)
    assert "\n" not in message
    return message.replace(str(folder), "DIR")


def test_a_folder_becomes_items_and_splits_of_fixed_columns_and_types(data_folder: DataFolder) -> None:
    test = HEADER.replace("label", "extra,label") + "w,B,x,1,40\n"
    dataset = load_dataset(data_folder(test_csv=test))
    assert dataset.items.to_dict(as_series=False) == {
        "item_id": ["A", "B", "C"],
        "title": ["Alpha", "Beta", "Gamma"],
    }
    assert list(dataset.splits) == ["train", "valid", "test"]
    for frame in dataset.splits.values():
        assert frame.schema == {
            "user_id": pl.String,
            "item_id": pl.String,
            "label": pl.Int8,
            "timestamp": pl.Int64,
            "weight": pl.Float32,
        }
    assert dataset.splits["train"].rows() == [("u", "A", 1, 10, 1), ("u", "B", 0, 20, 1), ("v", "A", 1, 15, 1)]


def test_one_fraction_of_a_second_makes_the_timestamps_of_all_splits_floats(data_folder: DataFolder) -> None:
    dataset = load_dataset(data_folder(valid_csv=HEADER + "u,A,1,30.5\n"))
    assert {frame.schema["timestamp"] for frame in dataset.splits.values()} == {pl.Float64()}


def test_fingerprint_is_the_same_for_parquet_and_csv_and_tells_every_change(
    data_folder: DataFolder, tmp_path: Path
) -> None:
    rows = {"user_id": [7, 7, 8], "item_id": [1, 2, 1], "label": [1, 0, 1], "timestamp": [10.0, 20.0, 15.0]}
    tables = {
        "items": pl.DataFrame({"item_id": [1, 2], "title": ["É", "BC"]}),
        "train": pl.DataFrame(rows),
        "valid": pl.DataFrame(rows),
    }
    seen = []
    for name, change in {
        "parquet": {},
        "csv": {},
        "user": {"train": tables["train"].with_columns(user_id=pl.Series([7, 7, 9]))},
        "label": {"valid": tables["valid"].with_columns(label=pl.Series([1, 1, 1]))},
        "weight": {"train": tables["train"].with_columns(weight=pl.Series([1, 1, 2]))},
        "time": {"train": tables["train"].with_columns(timestamp=pl.Series([10.0, 20.0, 15.5]))},
        # The same characters, divided otherwise.
        "title": {"items": pl.DataFrame({"item_id": [1, 2], "title": ["ÉB", "C"]})},
        "order": {"train": tables["train"][::-1]},
        "test": {"test": tables["valid"]},
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        for table, frame in {**tables, **change}.items():
            if name == "csv":
                frame.write_csv(folder / f"{table}.csv")
            else:
                frame.write_parquet(folder / f"{table}.parquet")
        seen.append(load_dataset(folder).fingerprint())
    assert seen[0] == seen[1]
    assert len(set(seen[1:])) == len(seen) - 1
    assert len(seen[0]) == 64


def test_titles_are_cleaned_and_counted(data_folder: DataFolder) -> None:
    dataset = load_dataset(data_folder(items_csv='item_id,title\nA,"Al\npha"\nB,Beta\nC, Gamma\n'))
    assert dataset.items["title"].to_list() == ["Al pha", "Beta", "Gamma"]
    assert dataset.titles_cleaned == 2


def test_ratings_become_labels_above_the_threshold(data_folder: DataFolder) -> None:
    rated = "user_id,item_id,rating,timestamp\nu,A,3,1\nu,B,3.5,2\n"
    folder = data_folder(train_csv=rated, valid_csv=rated)
    assert load_dataset(folder, positive_above=3).splits["train"]["label"].to_list() == [0, 1]


def test_one_interactions_file_is_split_by_time(data_folder: DataFolder) -> None:
    rows = "".join(f"u,A,1,{second}\n" for second in (5, 1, 4, 2, 3))
    folder = data_folder(train_csv=None, valid_csv=None, interactions_csv=HEADER + rows)
    dataset = load_dataset(folder, split=SplitRule(fractions=(0.6, 0.2, 0.2)))
    times = {name: frame["timestamp"].to_list() for name, frame in dataset.splits.items()}
    assert times == {"train": [1, 2, 3], "valid": [4], "test": [5]}
    ten = HEADER + "".join(f"u,A,1,{second}\n" for second in range(10))
    by_default = load_dataset(data_folder(train_csv=None, valid_csv=None, interactions_csv=ten))
    assert [frame.height for frame in by_default.splits.values()] == [8, 1, 1]


def test_only_the_required_splits_must_be_there(data_folder: DataFolder) -> None:
    folder = data_folder(train_csv=None, valid_csv=None, test_csv=HEADER + "u,A,1,1\n")
    assert list(load_dataset(folder, require=("test",)).splits) == ["test"]
    assert refusal(folder) == (
        "DIR: split 'train' is needed but not there; found: items.csv, test.csv; add train.parquet or train.csv"
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"items_csv": None}, "DIR: items.parquet or items.csv is missing; found: train.csv, valid.csv"),
        (
            {"items_csv": "item_id,name\nA,Alpha\n"},
            "items.csv: column 'title' is missing; found: item_id, name",
        ),
        (
            {"items_csv": "item_id,title\nA,Alpha\nB,\nC, \n"},
            "items.csv: column 'title', row 2: '' is no title; give every item a title or drop the item "
            "(2 rows have this problem)",
        ),
        (
            {"items_csv": "item_id,title\nA,Alpha\nB,Beta\nA,Gamma\n"},
            "items.csv: column 'item_id', row 3: 'A' stands in an earlier row too; keep one row an item",
        ),
        (
            {"items_csv": "item_id,title\nA,Alpha\n"},
            "train.csv: column 'item_id', row 2: 'B' is not in items.csv; add the item there or drop the row",
        ),
        (
            {"train_csv": HEADER + "u,A,1,1\nu,A,2,1\n"},
            "train.csv: column 'label', row 2: '2' is neither 0 nor 1; give 0 or 1, or name the column 'rating' "
            "and use --positive-above",
        ),
        (
            {"valid_csv": HEADER + "u,A,1,yesterday\n"},
            "valid.csv: column 'timestamp', row 1: 'yesterday' is no timestamp; give UTC seconds or ISO 8601, as "
            "in 2017-11-30T12:00:00Z",
        ),
        (
            {"train_csv": "user_id,item_id,timestamp\nu,A,1\n"},
            "train.csv: column 'label' is missing; found: user_id, item_id, timestamp",
        ),
        (
            {"train_csv": "user_id,item_id,timestamp,rating,label\nu,A,1,5,1\n"},
            "train.csv: has both 'label' and 'rating'; keep one of the two columns",
        ),
        (
            {"train_csv": "user_id,item_id,timestamp,rating\nu,A,1,5\n"},
            "train.csv: has 'rating' but no 'label'; say which are positive, as in --positive-above 3",
        ),
        ({"valid_csv": HEADER}, "valid.csv: holds no rows; add rows or remove the file"),
        (
            {"interactions_csv": HEADER},
            "DIR: holds interactions.csv beside train.csv, valid.csv; keep either the whole or its splits",
        ),
        (
            {"train_csv": None, "valid_csv": None},
            "DIR: holds no interactions; found: items.csv; add train and valid, or one interactions (.parquet or .csv)",
        ),
        (
            {"train_parquet": pl.DataFrame({"user_id": [1]})},
            "DIR: both train.parquet and train.csv are there; remove one of them",
        ),
    ],
)
def test_every_problem_is_one_line_with_file_column_row_and_mend(
    data_folder: DataFolder, files: dict[str, Any], message: str
) -> None:
    assert refusal(data_folder(**files)) == message


def test_options_that_do_not_apply_are_refused_rather_than_ignored(data_folder: DataFolder) -> None:
    folder = data_folder()
    assert refusal(folder, positive_above=3.0) == (
        "train.csv: has 'label', which --positive-above does not apply to; drop the option"
    )
    assert refusal(folder, split=SplitRule()) == (
        "DIR: is split already (train, valid); drop the rule for splitting, or give one interactions file"
    )


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none").endswith(": no such folder; give a folder that holds items and interactions")


def rows_of(*rows: tuple[str, str, int, int]) -> str:
    return HEADER + "".join(",".join(map(str, row)) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"train_csv": rows_of(("u", "A", 1, 10), ("v", "B", 1, 11))},
            "train.csv: holds one label alone (2 rows, 2 of label 1, 0 of label 0); give rows of both labels, or"
            " another --positive-above or --split-by",
        ),
        (
            {"valid_csv": rows_of(("u", "A", 0, 30), ("v", "B", 0, 31), ("v", "C", 0, 32))},
            "valid.csv: holds one label alone (3 rows, 0 of label 1, 3 of label 0); give rows of both labels, or"
            " another --positive-above or --split-by",
        ),
        (
            {"train_csv": rows_of(("u", "A", 1, 10), ("u", "B", 0, 11))},
            "train.csv: holds 2 rows of 1 of the users; training needs at least 2 users, and hundreds to learn"
            " something: add rows of other users",
        ),
        (
            {"train_csv": rows_of(("u", "A", 1, 10), ("v", "A", 0, 11))},
            "train.csv: holds 2 rows of 1 of the items; training needs at least 2 items, and hundreds to learn"
            " something: add rows of other items",
        ),
        (
            {
                "train_csv": None,
                "valid_csv": None,
                "interactions_csv": rows_of(*(("u", "A", int(second < 8), second) for second in range(10))),
            },
            "interactions.csv, split train: holds one label alone (8 rows, 8 of label 1, 0 of label 0); give rows of"
            " both labels, or another --positive-above or --split-by",
        ),
    ],
)
def test_data_from_which_nothing_can_be_learned_is_refused(
    data_folder: DataFolder, files: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as raised:
        require_learnable(load_dataset(data_folder(**files)))
    assert str(raised.value) == message


def test_the_least_data_from_which_something_can_be_learned_is_accepted(data_folder: DataFolder) -> None:
    dataset = load_dataset(data_folder())
    require_learnable(dataset)
    assert dataset.warnings == ()


def test_times_that_are_likely_a_mistake_are_told(data_folder: DataFolder) -> None:
    days = load_dataset(
        data_folder(train_csv=HEADER + "u,A,1,17500\nv,B,0,17501\n", valid_csv=HEADER + "u,C,1,17600\n")
    )
    assert days.warnings == tuple(
        f"{name}.csv: every timestamp lies in 1970; check that they are seconds since 1970"
        for name in ("train", "valid")
    )
    swapped = load_dataset(
        data_folder(valid_csv=HEADER + "u,C,1,5\nw,A,0,15\nw,B,0,30\n", test_csv=HEADER + "u,C,1,40\n")
    )
    assert swapped.warnings == (
        "valid.csv: 2 of 3 rows of valid are older than the newest row of train; figures on them look back from the"
        " future",
    )


def test_columns_of_other_names_are_read_in_every_table_that_has_them(data_folder: DataFolder) -> None:
    folder = data_folder(
        items_csv="movieId,name\nA,Alpha\nB,Beta\n",
        train_csv="userId,movieId,stars,when\nu,A,5,1\nv,B,1,2\n",
        valid_csv="user_id,item_id,rating,timestamp\nu,B,2,3\n",
    )
    columns = parse_columns("user_id=userId, item_id=movieId,title=name,rating=stars,timestamp=when")
    dataset = load_dataset(folder, columns=columns, positive_above=3)
    assert dataset.splits["train"].rows() == [("u", "A", 1, 1, 1), ("v", "B", 0, 2, 1)]
    assert dataset.splits["valid"].rows() == [("u", "B", 0, 3, 1)]
    assert dataset.items.rows() == [("A", "Alpha"), ("B", "Beta")]
    assert refusal(folder, columns={"item_id": "sku"}) == (
        "items.csv: column 'sku' (for 'item_id') is missing; found: movieId, name"
    )


@pytest.mark.parametrize("text", ["user=userId", "user_id", "user_id=", "user_id=a,user_id=b"])
def test_a_mapping_of_columns_that_cannot_be_used_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"^--columns "):
        parse_columns(text)


def test_missing_items_are_counted_and_raw_data_names_its_command(data_folder: DataFolder) -> None:
    rows = rows_of(("u", "A", 1, 1), ("u", "X", 1, 2), ("v", "X", 0, 3), ("v", "Y", 0, 4))
    assert refusal(data_folder(train_csv=rows)) == (
        "train.csv: column 'item_id', row 2: 'X' is not in items.csv; add the item there or drop the row; 2 items are"
        " missing (3 rows have this problem)"
    )
    raw = data_folder(items_csv=None, train_csv=None, valid_csv=None, ratings_csv="userId,movieId,rating,timestamp\n")
    for left in ("items.csv", "train.csv", "valid.csv"):
        (raw / left).unlink(missing_ok=True)
    assert refusal(raw).endswith(
        "found: ratings.csv; ratings.csv is raw MovieLens data: sella-train prepare movielens DIR --out DIR"
    )
