from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from training.data.dataset import DataError, load_dataset
from training.data.split import SplitRule
from training.start import read_data

DataFolder = Callable[..., Path]


def deleting(folder: Path, text: str) -> Path:
    (folder / "deleted_users.csv").write_text(f"user_id,deleted_at\n{text}\n")
    return folder


def users(folder: Path) -> dict[str, list[tuple[str, int]]]:
    splits = load_dataset(folder).splits
    return {name: list(zip(frame["user_id"], frame["timestamp"], strict=True)) for name, frame in splits.items()}


def test_rows_up_to_the_deletion_are_dropped_and_later_ones_stay(data_folder: DataFolder) -> None:
    assert users(deleting(data_folder(), "u,20\nnobody,5\nu,10")) == {
        "train": [("v", 15)],
        "valid": [("u", 30), ("w", 31)],
    }


def test_dropping_comes_before_the_split_by_time(data_folder: DataFolder) -> None:
    rows = "".join(f"u{number % 5},A,1,{number}\n" for number in range(10))
    deleted = pl.DataFrame({"user_id": ["u0"], "deleted_at": [100.5]})
    folder = data_folder(
        train_csv=None,
        valid_csv=None,
        interactions_csv="user_id,item_id,label,timestamp\n" + rows,
    )
    deleted.write_parquet(folder / "deleted_users.parquet")
    dataset = load_dataset(folder, split=SplitRule.parse("0.5,0.5"), require=())
    assert [frame.height for frame in dataset.splits.values()] == [4, 4] and dataset.rows_forgotten == 2


def test_the_fingerprint_tells_deletions_even_of_users_without_rows(data_folder: DataFolder) -> None:
    fingerprints = {load_dataset(data_folder()).fingerprint()}
    for text in ("nobody,5", "nobody,6", "u,20"):
        fingerprints.add(load_dataset(deleting(data_folder(), text)).fingerprint())
    assert len(fingerprints) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("u,soon", "deleted_users.csv: column 'deleted_at', row 1: 'soon' is no timestamp"),
        ("u,99\nv,99", "train.csv: holds rows of deleted users alone"),
    ],
)
def test_a_table_that_breaks_a_rule_is_refused(data_folder: DataFolder, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(deleting(data_folder(), text))


def test_the_commands_say_it_in_one_line(data_folder: DataFolder, capsys: pytest.CaptureFixture[str]) -> None:
    read_data(deleting(data_folder(), "u,20"), None, None)
    assert capsys.readouterr().err == "1 deleted users: 2 rows of theirs are left out\n"
