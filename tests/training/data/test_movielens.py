from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from training.data.dataset import DataError, load_dataset
from training.data.movielens import prepare_movielens
from training.data.report import SplitSize

MOVIES = """\
1::Toy of Stone (1995)::Animation|Children's
2::Amélie's Ghost (1998)::Drama
10::Nobody Rated This (1990)::Drama
11::Mission:: Unlikely (1996)::Action
"""


def seconds(year: int, month: int, day: int, second: int = 0) -> int:
    return int(datetime(year, month, day, tzinfo=UTC).timestamp()) + second


def raw_folder(folder: Path, ratings: list[tuple[int, int, int, int]], movies: str = MOVIES) -> Path:
    """Write the two files as GroupLens publishes them: `::` between fields, Latin-1."""
    folder.mkdir(exist_ok=True)
    lines = ["::".join(map(str, rating)) + "\n" for rating in ratings]
    (folder / "ratings.dat").write_text("".join(lines), encoding="latin-1")
    (folder / "movies.dat").write_text(movies, encoding="latin-1")
    return folder


def rows(out: Path, split: str) -> list[tuple[int, ...]]:
    return pl.read_parquet(out / f"{split}.parquet").rows()


FIRST = (1, 1, 5, seconds(2000, 4, 25))


def test_rows_fall_into_the_published_months(tmp_path: Path) -> None:
    edges = {
        "before": seconds(2001, 6, 1, -1),
        "train": seconds(2001, 6, 1),
        "train end": seconds(2002, 4, 1, -1),
        "valid": seconds(2002, 4, 1),
        "valid end": seconds(2002, 9, 1, -1),
        "test": seconds(2002, 9, 1),
        "test end": seconds(2003, 2, 1, -1),
        "after": seconds(2003, 2, 1),
    }
    raw = raw_folder(tmp_path / "raw", [FIRST, *((2, 1, 4, moment) for moment in edges.values())])
    report = prepare_movielens(raw, tmp_path / "out")
    times = {split: [row[3] for row in rows(tmp_path / "out", split)] for split in ("train", "valid", "test")}
    assert times == {
        "train": [edges["train"], edges["train end"]],
        "valid": [edges["valid"], edges["valid end"]],
        "test": [edges["test"], edges["test end"]],
    }
    assert report.dropped == {
        "movie without a title in movies.dat": 0,
        "month outside of train, valid and test": 3,
    }
    assert report.splits["train"] == SplitSize(rows=2, users=1, items=1, positives=2)


def test_columns_labels_numbers_and_titles_are_those_of_the_published_files(tmp_path: Path) -> None:
    ratings = [
        FIRST,
        (7, 2, 4, seconds(2002, 5, 1)),
        (7, 11, 3, seconds(2002, 1, 1)),
        (9, 1, 5, seconds(2002, 1, 2)),
        (9, 99, 5, seconds(2002, 1, 3)),
        (9, 2, 1, seconds(2002, 1, 1)),
    ]
    out = tmp_path / "out"
    report = prepare_movielens(raw_folder(tmp_path / "raw", ratings), out)
    # User 1 and movie 10 are in no split; movie 99 has no title. By user and time: 11, 2, then 2, 1.
    assert rows(out, "train") == [
        (1, 1, 0, seconds(2002, 1, 1)),
        (2, 2, 0, seconds(2002, 1, 1)),
        (2, 3, 1, seconds(2002, 1, 2)),
    ]
    assert rows(out, "valid") == [(1, 2, 1, seconds(2002, 5, 1))]
    assert rows(out, "items") == [
        (1, "Mission:: Unlikely (1996)"),
        (2, "Amélie's Ghost (1998)"),
        (3, "Toy of Stone (1995)"),
    ]
    assert pl.read_parquet_schema(out / "train.parquet") == dict.fromkeys(
        ("user_id", "item_id", "label", "timestamp"), pl.Int64
    )
    assert report.dropped["movie without a title in movies.dat"] == 1
    assert report.items == 3
    assert not (out / "test.parquet").exists()
    assert load_dataset(out).items["item_id"].to_list() == ["1", "2", "3"]


def test_equal_timestamps_are_in_the_order_in_which_the_file_first_names_their_items(tmp_path: Path) -> None:
    moment = seconds(2002, 1, 1)
    ratings = [
        FIRST,
        (1, 11, 5, FIRST[3]),
        (1, 2, 5, FIRST[3]),
        (7, 2, 5, moment),
        (7, 11, 1, moment),
        (7, 1, 1, moment),
    ]
    prepare_movielens(raw_folder(tmp_path / "raw", ratings), tmp_path / "out")
    titles = pl.read_parquet(tmp_path / "out" / "items.parquet")["title"].to_list()
    assert titles == ["Toy of Stone (1995)", "Mission:: Unlikely (1996)", "Amélie's Ghost (1998)"]


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("ratings.dat", "1::2::3", "ratings.dat: row 2: '1::2::3' is not UserID::MovieID::Rating::Timestamp"),
        ("ratings.dat", "1::2::x::4", "ratings.dat: row 2: '1::2::x::4' is not UserID::MovieID"),
        ("movies.dat", "12,Comma (1999),Drama", "movies.dat: row 5: '12,Comma (1999),Drama' is not MovieID::"),
        ("movies.dat", "12::No genre", "movies.dat: row 5: '12::No genre' is not MovieID::Title::Genres"),
    ],
)
def test_lines_of_another_form_are_told_with_their_row(tmp_path: Path, file: str, line: str, message: str) -> None:
    raw = raw_folder(tmp_path, [FIRST])
    with (raw / file).open("a") as whole:
        whole.write(line + "\n")
    with pytest.raises(DataError) as raised:
        prepare_movielens(raw, tmp_path / "out")
    assert str(raised.value).startswith(message)


def test_missing_files_and_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ratings\.dat: no such file"):
        prepare_movielens(tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match=r"holds no rating of a movie that movies\.dat names; check both files"):
        prepare_movielens(raw_folder(tmp_path, [FIRST], movies="5::A::B\n"), tmp_path / "out")
    with pytest.raises(DataError, match=r"holds no rating in months 14 to 33 after its first"):
        prepare_movielens(raw_folder(tmp_path, [FIRST]), tmp_path / "out")
