"""Raw MovieLens to a data folder: every release, and MovieLens-1M in the split of CoLLM, BinLLM and SeLLa-Rec.

| release | ratings | titles |
| --- | --- | --- |
| 100K | `u.data`, tabs | `u.item`, pipes, Latin-1 |
| 1M, 10M | `ratings.dat`, `::` | `movies.dat`, `::`, Latin-1 (10M: UTF-8) |
| 20M, 25M, 32M, latest | `ratings.csv` | `movies.csv`, UTF-8 |
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl

from training.data.columns import parse_ids, parse_ratings, parse_timestamps
from training.data.errors import DataError
from training.data.folder import write_folder
from training.data.raw import OpenRaw, open_raw, read_lines, require_files, text_encoding
from training.data.report import Report, describe
from training.data.split import SplitRule, split_by_time
from training.data.tables import Table, find_table, read_table

# Calendar months (UTC) counted from the month of the first rating, last month included.
SPLIT_MONTHS = {"train": (14, 23), "valid": (24, 28), "test": (29, 33)}
LEAST_POSITIVE_RATING = 4
POSITIVE_ABOVE = 3.5  # the same for whole stars; with half stars four and more
CSV_COLUMNS = {"user_id": "userId", "item_id": "movieId"}


@dataclass(frozen=True)
class _Form:
    """How the files of an older release are written."""

    ratings: str
    titles: str
    separator: str
    rating_form: str
    title_form: str
    title_of: Callable[[str], tuple[str, str | None]]  # the movie and its title; None if the line is malformed


def _title_of_dat(line: str) -> tuple[str, str | None]:
    # A title may itself hold the separator, the first and the last field cannot.
    movie, _, rest = line.partition("::")
    title, separator, _ = rest.rpartition("::")
    return movie, title if separator else None


def _title_of_item(line: str) -> tuple[str, str | None]:
    movie, *rest = line.split("|")
    return movie, rest[0] if len(rest) > 1 else None


DAT = _Form(
    "ratings.dat",
    "movies.dat",
    "::",
    "UserID::MovieID::Rating::Timestamp",
    "MovieID::Title::Genres",
    _title_of_dat,
)
HUNDRED_THOUSAND = _Form(
    "u.data",
    "u.item",
    "\t",
    "user, item, rating and timestamp between tabs",
    "movie|title|date|…",
    _title_of_item,
)


def prepare_movielens(
    raw: Path,
    out: Path,
    *,
    positive_above: float | None = None,
    split: SplitRule | None = None,
    open_file: OpenRaw = open_raw,
) -> Report:
    """Write train, valid, test and items of a release.

    MovieLens-1M is split and numbered as in the published files, unless `positive_above` or `split` is given. All other
    releases keep their ids, are cut by time, and keep every titled movie as an item.

    Args:
        raw: the folder of the release's files.
        out: the data folder to write.
        positive_above: ratings above this are positive; None for 3.5.
        split: how the ratings are cut by time; None for the default fractions.
        open_file: opens each raw file that is no CSV.

    Raises:
        DataError: a raw file is missing or holds a line of another form.
    """
    if (ratings_path := find_table(raw, "ratings")) is not None:
        return _prepare_csv(ratings_path, out, positive_above, split)
    if not any((raw / form.ratings).is_file() for form in (DAT, HUNDRED_THOUSAND)):
        raise DataError(
            f"{raw / DAT.ratings}: no such file; unpack the raw data set there: {DAT.ratings} and {DAT.titles},"
            f" ratings.csv and movies.csv, or {HUNDRED_THOUSAND.ratings} and {HUNDRED_THOUSAND.titles}"
        )
    form = HUNDRED_THOUSAND if (raw / HUNDRED_THOUSAND.ratings).is_file() else DAT
    require_files(raw / form.ratings, raw / form.titles)
    encoding = text_encoding(raw / form.titles)
    notes = () if encoding == "latin-1" else (f"{form.titles} is read as UTF-8",)
    titles = _read_titles(raw, form, encoding, open_file)
    ratings = _read_ratings(raw, form, open_file)
    halves = bool((ratings["rating"] != ratings["rating"].floor()).any())
    own_rules = positive_above is not None or split is not None
    if form is DAT and not (own_rules or halves or (raw / "tags.dat").is_file()):  # 10M has tags
        return _prepare_published(ratings, titles, out, notes)
    rows = ratings.select(
        pl.col("user").cast(pl.String).alias("user_id"),
        pl.col("movie").cast(pl.String).alias("item_id"),
        (pl.col("rating") > (POSITIVE_ABOVE if positive_above is None else positive_above))
        .cast(pl.Int8)
        .alias("label"),
        "timestamp",
    )
    items = titles.select(pl.col("movie").cast(pl.String).alias("item_id"), "title")
    return _write_by_time(rows, items, out, split, form.ratings, form.titles, notes)


def _prepare_csv(ratings_path: Path, out: Path, positive_above: float | None, split: SplitRule | None) -> Report:
    movies_path = find_table(ratings_path.parent, "movies")
    if movies_path is None:
        raise DataError(f"{ratings_path.parent / 'movies.csv'}: no such file; unpack the raw data set there")
    movies = read_table(movies_path, ["item_id", "title"], columns=CSV_COLUMNS)
    titled = Table(movies.file, movies.frame.filter(pl.col("title").str.strip_chars() != ""))
    items = pl.DataFrame([parse_ids(titled, "item_id"), titled.frame["title"]])
    ratings = read_table(ratings_path, ["user_id", "item_id", "rating", "timestamp"], columns=CSV_COLUMNS)
    rows = pl.DataFrame(
        [
            parse_ids(ratings, "user_id"),
            parse_ids(ratings, "item_id"),
            parse_ratings(ratings, POSITIVE_ABOVE if positive_above is None else positive_above),
            parse_timestamps(ratings, "timestamp"),
        ]
    )
    return _write_by_time(rows, items.unique("item_id", keep="first", maintain_order=True), out, split,
                          ratings_path.name, movies_path.name, ())  # fmt: skip


def _write_by_time(
    rows: pl.DataFrame,
    items: pl.DataFrame,
    out: Path,
    split: SplitRule | None,
    ratings_file: str,
    titles_file: str,
    notes: tuple[str, ...],
) -> Report:
    titled = rows.join(items, on="item_id", how="semi", maintain_order="left")
    if titled.height == 0:
        raise _nothing_titled(ratings_file, titles_file)
    tables = {"items": items, **split_by_time(titled, split or SplitRule(), ratings_file)}
    write_folder(out, tables)
    return describe(tables, {f"movie without a title in {titles_file}": rows.height - titled.height}, notes)


def _prepare_published(ratings: pl.DataFrame, titles: pl.DataFrame, out: Path, notes: tuple[str, ...]) -> Report:
    """Write MovieLens-1M with the numbering of the published files.

    Users and items are numbered from 1 by first appearance in the kept rows, sorted by raw user and time. Equal
    timestamps of a user are in the order in which their items first appear in `ratings.dat`: published
    preprocessing joins ratings and titles before it sorts, which leaves the rows item by item. Another order would
    number the items differently.
    """
    titled = ratings.join(titles, on="movie", maintain_order="left")
    if titled.height == 0:
        raise _nothing_titled(DAT.ratings, DAT.titles)
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
        notes,
    )


def _nothing_titled(ratings: str, titles: str) -> DataError:
    return DataError(f"{ratings}: holds no rating of a movie that {titles} names; check both files")


def _read_titles(raw: Path, form: _Form, encoding: str, open_file: OpenRaw) -> pl.DataFrame:
    """Return movie → title."""
    titles: dict[int, str] = {}
    for row, line in read_lines(raw / form.titles, encoding, open_file):
        movie, title = form.title_of(line.removeprefix("\ufeff"))
        if title is None or not movie.isdecimal():
            raise _malformed(raw / form.titles, row, line, form.title_form)
        if title.strip():
            titles[int(movie)] = title.strip()
    return pl.DataFrame(
        {"movie": list(titles), "title": list(titles.values())},
        schema={"movie": pl.Int64, "title": pl.String},
    )


def _read_ratings(raw: Path, form: _Form, open_file: OpenRaw) -> pl.DataFrame:
    """Return the ratings in file order; 32 bytes a row."""
    user, movie, timestamp = (array("q") for _ in range(3))
    rating = array("d")
    for row, line in read_lines(raw / form.ratings, "latin-1", open_file):
        try:
            one, two, stars, moment = line.split(form.separator)
            user.append(int(one))
            movie.append(int(two))
            rating.append(float(stars))
            timestamp.append(int(moment))
        except ValueError:
            raise _malformed(raw / form.ratings, row, line, form.rating_form) from None
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
