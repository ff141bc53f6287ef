from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from training.data.dataset import DataError, load_dataset
from training.data.movielens import prepare_movielens
from training.data.report import SplitSize
from training.data.split import SplitRule

LATEST = Path(__file__).parents[4] / "shared" / "data" / "ml-latest-small"

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


def rows(out: Path, split: str) -> list[tuple[Any, ...]]:
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
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,5,100\n")
    with pytest.raises(DataError, match=r"movies\.csv: no such file"):
        prepare_movielens(tmp_path / "csv", tmp_path / "out")
    with pytest.raises(DataError, match=r"holds no rating of a movie that movies\.dat names; check both files"):
        prepare_movielens(raw_folder(tmp_path, [FIRST], movies="5::A::B\n"), tmp_path / "out")
    with pytest.raises(DataError, match=r"holds no rating in months 14 to 33 after its first"):
        prepare_movielens(raw_folder(tmp_path, [FIRST]), tmp_path / "out")


RATINGS = [(1, 1, 5, 100), (1, 2, 3, 101), (2, 1, 4, 102), (2, 2, 2, 103), (3, 9, 5, 104)]
BY_TIME = {"split": SplitRule(fractions=(0.5, 0.25, 0.25))}


def release(folder: Path, name: str) -> Path:
    """Write four rated movies and one that nobody has titled, as a release does."""
    if name == "100K":
        (folder / "u.data").write_text("".join("\t".join(map(str, one)) + "\n" for one in RATINGS))
        (folder / "u.item").write_text(
            "1|Amélie's Ghost (1998)|01-Jan-1998||http://x|0|1\n2|Two, or More|01-Jan-1995||http://y|1|0\n",
            encoding="latin-1",
        )
    elif name == "10M":
        raw_folder(folder, RATINGS[:1])
        lines = "".join(f"{user}::{movie}::{stars}::{at}\n" for user, movie, stars, at in RATINGS)
        (folder / "ratings.dat").write_text(lines.replace("::3::", "::3.5::"))
        (folder / "movies.dat").write_text("1::Amélie's Ghost (1998)::Drama\n2::Two, or More::A\n", encoding="utf-8")
        (folder / "tags.dat").write_text("")
    else:
        lines = [
            f"{user},{movie},{stars - 0.5 if stars == 4 else float(stars)},{at}\n" for user, movie, stars, at in RATINGS
        ]
        (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "".join(lines))
        (folder / "movies.csv").write_text(
            'movieId,title,genres\n1,Amélie\'s Ghost (1998),Drama\n2,"Two, or More",A|B\n', encoding="utf-8"
        )
    return folder


@pytest.mark.parametrize("name", ["100K", "10M", "latest"])
def test_every_release_is_read_and_cut_by_time(tmp_path: Path, name: str) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    report = prepare_movielens(release(raw, name), out, split=SplitRule(fractions=(0.5, 0.25, 0.25)))
    last = int(name != "latest")  # 4 stars, in half stars 3.5, which is not above 3.5
    assert rows(out, "train") == [("1", "1", 1, 100), ("1", "2", 0, 101)]
    assert rows(out, "valid") == [("2", "1", last, 102)] and rows(out, "test") == [("2", "2", 0, 103)]
    assert rows(out, "items") == [("1", "Amélie's Ghost (1998)"), ("2", "Two, or More")]
    [(reason, dropped)] = report.dropped.items()
    assert reason.startswith("movie without a title") and dropped == 1
    load_dataset(out)


@pytest.mark.parametrize("name", ["100K", "latest"])
def test_positive_above_and_dates_may_be_chosen(tmp_path: Path, name: str) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    rule = SplitRule.parse("1970-01-01T00:01:42,1970-01-01T00:01:43")
    prepare_movielens(release(raw, name), out, positive_above=2.5, split=rule)
    assert [row[2] for row in rows(out, "train")] == [1, 1]


def test_ten_million_is_told_from_one_million_by_its_half_stars_or_tags(tmp_path: Path) -> None:
    raw = raw_folder(
        tmp_path / "raw", [FIRST, (1, 2, 4, FIRST[3] + 1), (2, 1, 3, FIRST[3] + 2), (2, 2, 2, FIRST[3] + 3)]
    )
    with pytest.raises(DataError, match="months 14 to 33"):
        prepare_movielens(raw, tmp_path / "out")
    (raw / "tags.dat").write_text("")
    assert prepare_movielens(raw, tmp_path / "out", **BY_TIME).splits["train"].rows == 2
    (raw / "tags.dat").unlink()
    (raw / "ratings.dat").write_text((raw / "ratings.dat").read_text().replace("::4::", "::4.5::"))
    assert prepare_movielens(raw, tmp_path / "other", **BY_TIME).splits["train"].rows == 2


@pytest.mark.parametrize(("encoding", "noted"), [("latin-1", False), ("utf-8", True), ("utf-8-sig", True)])
def test_accents_are_right_in_both_encodings_in_which_copies_circulate(
    tmp_path: Path, encoding: str, noted: bool
) -> None:
    raw = raw_folder(tmp_path / "raw", [FIRST, (7, 2, 4, seconds(2002, 1, 1)), (7, 1, 4, seconds(2002, 1, 2))])
    (raw / "movies.dat").write_text(MOVIES, encoding=encoding)
    report = prepare_movielens(raw, tmp_path / "out")
    assert [row[1] for row in rows(tmp_path / "out", "items")] == ["Amélie's Ghost (1998)", "Toy of Stone (1995)"]
    assert report.notes == (("movies.dat is read as UTF-8",) if noted else ())


@pytest.mark.skipif(not LATEST.is_dir(), reason=f"MovieLens-latest-small is not at {LATEST}")
def test_the_release_of_today_is_read_whole(tmp_path: Path) -> None:
    report = prepare_movielens(LATEST, tmp_path / "out")
    assert report.items == 9742 and sum(one.rows for one in report.splits.values()) == 100_836
    assert report.dropped == {"movie without a title in movies.csv": 0}
    titles = set(load_dataset(tmp_path / "out").items["title"])
    assert {"Misérables, Les (1995)", "Toy Story (1995)"} <= titles
