"""Raw MovieLens-1M (`ratings.dat`, `movies.dat`) to a data folder, in the split of CoLLM, BinLLM and SeLLa-Rec."""

from array import array
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl

from training.data.errors import DataError
from training.data.folder import write_folder
from training.data.raw import OpenRaw, open_raw, read_lines, require_files
from training.data.report import Report, describe

# Calendar months (UTC) counted from the month of the first rating, last month included.
SPLIT_MONTHS = {"train": (14, 23), "valid": (24, 28), "test": (29, 33)}
LEAST_POSITIVE_RATING = 4
# Both files separate fields so, and predate UTF-8.
SEPARATOR = "::"
ENCODING = "latin-1"


def prepare_movielens(raw: Path, out: Path, *, open_file: OpenRaw = open_raw) -> Report:
    """Write train, valid, test and items, with the numbering of the published files.

    Users and items are numbered from 1 by first appearance in the kept rows, sorted by raw user and time. Equal
    timestamps of a user are in the order in which their items first appear in `ratings.dat`: published
    preprocessing joins ratings and titles before it sorts, which leaves the rows item by item. Another order would
    number the items differently.

    Args:
        raw: the folder of `ratings.dat` and `movies.dat`.
        out: the data folder to write.
        open_file: opens each raw file.

    Raises:
        DataError: a raw file is missing or holds a line of another form.
    """
    require_files(raw / "ratings.dat", raw / "movies.dat")
    titles = _read_titles(raw / "movies.dat", open_file)
    ratings = _read_ratings(raw / "ratings.dat", open_file)
    titled = ratings.join(titles, on="movie", maintain_order="left")
    if titled.height == 0:
        raise DataError("ratings.dat: holds no rating of a movie that movies.dat names; check both files")
    split_of_row = _split_of_row(first=_moment(titled["timestamp"].min()))
    rows = _number_ids(titled.with_columns(split_of_row).filter(pl.col("split").is_not_null()))
    if rows.height == 0:
        raise DataError("ratings.dat: holds no rating in months 14 to 33 after its first; get the whole file")
    tables = {"items": rows.unique("item_id", keep="first").sort("item_id").select("item_id", "title")}
    for name in SPLIT_MONTHS:
        part = rows.filter(pl.col("split") == name)
        tables[name] = part.select("user_id", "item_id", "label", "timestamp")
    write_folder(out, tables)
    return describe(
        tables,
        {
            "movie without a title in movies.dat": ratings.height - titled.height,
            "month outside of train, valid and test": titled.height - rows.height,
        },
    )


def _read_titles(path: Path, open_file: OpenRaw) -> pl.DataFrame:
    """Return movie → title, from lines `MovieID::Title::Genres`."""
    titles: dict[int, str] = {}
    for row, line in read_lines(path, ENCODING, open_file):
        # A title may itself hold the separator, the first and the last field cannot.
        movie, _, rest = line.partition(SEPARATOR)
        title, separator, _ = rest.rpartition(SEPARATOR)
        if not separator or not movie.isdecimal():
            raise _malformed(path, row, line, "MovieID::Title::Genres")
        if title.strip():
            titles[int(movie)] = title.strip()
    return pl.DataFrame(
        {"movie": list(titles), "title": list(titles.values())},
        schema={"movie": pl.Int64, "title": pl.String},
    )


def _read_ratings(path: Path, open_file: OpenRaw) -> pl.DataFrame:
    """Return the ratings in file order, from lines `UserID::MovieID::Rating::Timestamp`; 32 bytes a row."""
    user, movie, rating, timestamp = columns = [array("q") for _ in range(4)]
    for row, line in read_lines(path, ENCODING, open_file):
        fields = line.split(SEPARATOR)
        try:
            values = [int(field) for field in fields]
        except ValueError:
            values = []
        if len(values) != len(columns):
            raise _malformed(path, row, line, "UserID::MovieID::Rating::Timestamp")
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    ratings = pl.DataFrame(
        {
            "user": np.asarray(user),
            "movie": np.asarray(movie),
            "rating": np.asarray(rating),
            "timestamp": np.asarray(timestamp),
        }
    )
    return ratings.with_columns(_numbered(ratings["movie"], "movie_place"))


def _malformed(path: Path, row: int, line: str, form: str) -> DataError:
    return DataError(f"{path.name}: row {row}: {line[:60]!r} is not {form}; get the file again")


def _moment(seconds: object) -> datetime:
    assert isinstance(seconds, int)
    return datetime.fromtimestamp(seconds, UTC)


def _split_of_row(first: datetime) -> pl.Expr:
    """Return the name of each row's split, null outside of all; months count from that of `first`."""
    moment = pl.from_epoch("timestamp", time_unit="s").dt
    # Wide integers: polars gives the month in eight bits.
    month = (moment.year() - first.year) * 12 + moment.month().cast(pl.Int32) - first.month
    split = pl.lit(None, dtype=pl.String)
    for name, (begin, end) in SPLIT_MONTHS.items():
        split = pl.when(month.is_between(begin, end)).then(pl.lit(name)).otherwise(split)
    return split.alias("split")


def _number_ids(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the rows by user and time, with users and items numbered and ratings made labels."""
    rows = rows.sort("user", "timestamp", "movie_place")
    return rows.with_columns(
        _numbered(rows["user"], "user_id"),
        _numbered(rows["movie"], "item_id"),
        (pl.col("rating") >= LEAST_POSITIVE_RATING).cast(pl.Int64).alias("label"),
    )


def _numbered(values: pl.Series, name: str) -> pl.Series:
    """Return each value's number: 1, 2, … by first appearance."""
    distinct = values.unique(maintain_order=True)
    numbers = pl.int_range(1, len(distinct) + 1, dtype=pl.Int64, eager=True)
    return values.replace_strict(distinct, numbers).alias(name)
