from pathlib import Path

import polars as pl
import pytest

from training.data.errors import DataError
from training.data.folder import write_folder

ONE = pl.DataFrame({"item_id": ["A"]})
TWO = pl.DataFrame({"item_id": ["B"]})


def test_tables_of_an_earlier_run_are_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "data"
    write_folder(out, {"items": ONE, "train": ONE})
    write_folder(out, {"items": TWO, "train": TWO})
    assert sorted(path.name for path in out.iterdir()) == ["items.parquet", "train.parquet"]
    assert pl.read_parquet(out / "train.parquet").equals(TWO)


def test_a_table_without_rows_is_not_written(tmp_path: Path) -> None:
    write_folder(tmp_path, {"items": ONE, "test": ONE[:0]})
    assert [path.name for path in tmp_path.iterdir()] == ["items.parquet"]


@pytest.mark.parametrize("other", ["items.csv", "interactions.parquet", "test.parquet"])
def test_a_table_that_would_contradict_the_new_ones_stops_the_writing(tmp_path: Path, other: str) -> None:
    (tmp_path / other).touch()
    with pytest.raises(DataError, match=f"holds {other}, which the new tables would contradict"):
        write_folder(tmp_path, {"items": ONE, "train": ONE})
    assert [path.name for path in tmp_path.iterdir()] == [other]


def test_a_failed_write_leaves_the_earlier_tables_whole(tmp_path: Path) -> None:
    write_folder(tmp_path, {"items": ONE, "train": ONE})
    (tmp_path / ".train.parquet.partial").mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        write_folder(tmp_path, {"items": TWO, "train": TWO})
    assert pl.read_parquet(tmp_path / "items.parquet").equals(ONE)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be made"):
        write_folder(tmp_path / "file", {"items": ONE})
