"""Raw Amazon reviews with metadata (JSON lines) to a data folder: one year, active users, months 11 : 0.5 : 0.5."""

import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from models.ids import IdError, canonical_id
from training.data.errors import DataError
from training.data.folder import write_folder
from training.data.raw import OpenRaw, open_raw, read_json_lines, require_files
from training.data.report import Report, describe
from training.data.split import SPLITS
from training.data.tables import TEXT_SUFFIXES, csv_parts

Halves = Literal["month", "rows"]

# The names of a field: of the releases of 2014 and 2018, then of 2023. In 2023 the metadata have the parent's id alone.
USER, RATING, TIME = ("reviewerID", "user_id"), ("overall", "rating"), ("unixReviewTime", "timestamp")
ITEM = ("asin", "parent_asin")
MILLISECONDS = 1e11  # a time above it, in seconds of the year 5138, is in milliseconds, as in 2023
# In the metadata of 2018, some titles are a script of the page that was scraped; this word gives them away.
SCRAPED_SCRIPT = "getTime"


def prepare_amazon(
    reviews: Path,
    metadata: Path,
    out: Path,
    *,
    year: int = 2017,
    min_interactions: int = 20,
    min_item_interactions: int = 0,
    threshold: float = 4.0,
    halves: Halves = "month",
    open_file: OpenRaw = open_raw,
) -> Report:
    """Write train (January to November), valid and test (the halves of December) and items.

    Reviews of items without a title are left out before anything is counted, since a prompt needs the title and
    an item id in its place would be a word the language model never saw. Each file is read once; of a review of
    the year, 24 bytes are kept, of other years nothing, and each id and title once.

    Args:
        reviews: objects with `reviewerID`, `asin`, `overall`, `unixReviewTime` (2014 and 2018), or with `user_id`,
            `parent_asin`, `rating`, `timestamp` in milliseconds (2023); gzip or plain.
        metadata: objects with `asin` or `parent_asin`, and `title`; gzip or plain. The last title of an item counts.
        out: the data folder to write.
        year: reviews of other years (UTC) are left out.
        min_interactions: users with this many reviews in the year or fewer are left out.
        min_item_interactions: the same for items, both counted before either is left out.
        threshold: the label is 1 when `overall` is above this; 4 leaves five stars, as published.
        halves: "month" cuts December at the start of its 16th day; "rows" cuts its rows, in time order, into two
            equal counts, even within a day, as the published files do.
        open_file: opens each raw file.

    Raises:
        DataError: a raw file is missing or damaged, lacks a field, or nothing is left.
    """
    require_files(reviews, metadata)
    log = _read_reviews(reviews, year, open_file)
    titles = _read_titles(metadata, log.items, open_file)
    rows = log.frame()
    titled = rows.join(titles, on="item", how="semi", maintain_order="left")
    active = titled.filter((pl.len().over("user") > min_interactions) & (pl.len().over("item") > min_item_interactions))
    if active.height == 0:
        raise DataError(
            f"{reviews.name}: of {log.read:,} reviews none is left: {rows.height:,} in {year}, {titled.height:,} "
            "of these of items with a title, none of these of users and items with enough interactions; "
            "check --year, --min-interactions and the metadata"
        )
    kept_items = active.select("item").unique().sort("item").join(titles, on="item", maintain_order="left")
    tables = {"items": kept_items.select(log.item_ids(), "title")}
    for name, part in _split_months(active, year, halves).items():
        label = (pl.col("overall") > threshold).cast(pl.Int8).alias("label")
        tables[name] = part.select(log.user_ids(), log.item_ids(), label, "timestamp")
    write_folder(out, tables)
    return describe(
        tables,
        {
            f"review outside of {year}": log.read - rows.height,
            "item without a title in the metadata": rows.height - titled.height,
            "user or item with too few interactions": titled.height - active.height,
        },
    )


@dataclass
class _Log:
    """One year's reviews as codes and numbers; a code is the place of an id among those seen."""

    users: dict[str, int] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    user: "array[int]" = field(default_factory=lambda: array("i"))
    item: "array[int]" = field(default_factory=lambda: array("i"))
    overall: "array[float]" = field(default_factory=lambda: array("d"))
    timestamp: "array[int]" = field(default_factory=lambda: array("q"))
    read: int = 0

    def append(self, user_id: str, item_id: str, overall: float, timestamp: int) -> None:
        self.user.append(self.users.setdefault(user_id, len(self.users)))
        self.item.append(self.items.setdefault(item_id, len(self.items)))
        self.overall.append(overall)
        self.timestamp.append(timestamp)

    def frame(self) -> pl.DataFrame:
        return pl.DataFrame(
            {name: np.asarray(getattr(self, name)) for name in ("user", "item", "overall", "timestamp")}
        )

    def user_ids(self) -> pl.Expr:
        """Return the ids of the codes in column `user`."""
        return pl.col("user").replace_strict(range(len(self.users)), list(self.users)).alias("user_id")

    def item_ids(self) -> pl.Expr:
        """Return the ids of the codes in column `item`."""
        return pl.col("item").replace_strict(range(len(self.items)), list(self.items)).alias("item_id")


def _read_reviews(path: Path, year: int, open_file: OpenRaw) -> _Log:
    begin, end = _seconds(year, 1, 1), _seconds(year + 1, 1, 1)
    log = _Log()
    for row, review in _records(path, open_file):
        log.read += 1
        timestamp = _number(path, row, review, _name(path, row, review, TIME))
        if timestamp > MILLISECONDS:
            timestamp /= 1000
        if begin <= timestamp < end:
            user_id = _id(path, row, review, _name(path, row, review, USER))
            item_id = _id(path, row, review, _name(path, row, review, ITEM))
            rating = _number(path, row, review, _name(path, row, review, RATING))
            log.append(user_id, item_id, rating, int(timestamp))
    return log


def _records(path: Path, open_file: OpenRaw) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (row from 1, review) of JSON lines, or of the table of ratings alone that the release of 2023 has too."""
    if not path.name.endswith(TEXT_SUFFIXES):
        yield from read_json_lines(path, open_file)
        return
    names = [names[1] for names in (USER, ITEM, RATING, TIME)]
    for first, part in csv_parts(path, names):
        numbers = part.with_columns(pl.col(name).cast(pl.Float64, strict=False) for name in names[2:] if name in part)
        yield from enumerate(numbers.iter_rows(named=True), first + 1)


def _read_titles(path: Path, items: dict[str, int], open_file: OpenRaw) -> pl.DataFrame:
    """Return item code → title, for reviewed items that have one."""
    titles: dict[int, str] = {}
    for row, product in read_json_lines(path, open_file):
        code = items.get(_id(path, row, product, _name(path, row, product, ITEM)))
        title = product.get("title")
        if code is not None and isinstance(title, str) and title.strip() and SCRAPED_SCRIPT not in title:
            titles[code] = title
    schema = {"item": pl.Int32, "title": pl.String}
    return pl.DataFrame({"item": list(titles), "title": list(titles.values())}, schema=schema)


def _split_months(rows: pl.DataFrame, year: int, halves: Halves) -> dict[str, pl.DataFrame]:
    """Return the splits in time order; equal timestamps (Amazon's are whole days) stay in file order."""
    rows = rows.sort("timestamp", maintain_order=True)
    valid_from = int(rows["timestamp"].search_sorted(_seconds(year, 12, 1)))
    if halves == "month":
        test_from = int(rows["timestamp"].search_sorted(_seconds(year, 12, 16)))
    else:
        test_from = valid_from + (rows.height - valid_from) // 2
    parts = (rows[:valid_from], rows[valid_from:test_from], rows[test_from:])
    return dict(zip(SPLITS, parts, strict=True))


def _seconds(year: int, month: int, day: int) -> int:
    return int(datetime(year, month, day, tzinfo=UTC).timestamp())


def _name(path: Path, row: int, record: Mapping[str, Any], names: tuple[str, str]) -> str:
    """Return which of the names a record has; the newer one, if both."""
    for name in reversed(names):
        if name in record:
            return name
    found = ", ".join(list(record)[:8])
    raise DataError(
        f"{path.name}: row {row} has neither {' nor '.join(names)}; found: {found}; give reviews and metadata"
    )


def _id(path: Path, row: int, record: Mapping[str, Any], name: str) -> str:
    try:
        return canonical_id(record.get(name))
    except IdError as error:
        raise DataError(f"{path.name}: column '{name}', row {row}: {error}") from None


def _number(path: Path, row: int, record: Mapping[str, Any], name: str) -> float:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{path.name}: column '{name}', row {row}: {value!r} is no number; mend or drop the line")
    return value
