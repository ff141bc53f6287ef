"""A data folder as one checked object: the items' titles and the splits of the interactions."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from training.data.columns import (
    YEAR_1971,
    parse_ids,
    parse_labels,
    parse_ratings,
    parse_timestamps,
    parse_titles,
    parse_weights,
)
from training.data.deletions import DELETED_USERS, read_deletions, without_deleted
from training.data.errors import DataError
from training.data.split import SPLITS, SplitRule, split_by_time
from training.data.tables import NO_COLUMNS, Table, find_table, missing_column, read_table

__all__ = ["DataError", "Dataset", "load_dataset"]

INTERACTIONS = "interactions"
AN_HOUR = 3600  # times within the first hour of 1970 are an example's, not a mistake
LEAST_DISTINCT = 2  # users, and items, of train
RAW_FILES = ("ratings.csv", "ratings.dat", "u.data")  # of MovieLens releases


@dataclass(frozen=True)
class Dataset:
    """Items and interactions, checked.

    Attributes:
        items: `item_id` (str, unique), `title` (str, one line); in file order.
        splits: "train", "valid", "test" (those that are there, in this order), each with `user_id` (str),
            `item_id` (str, all in `items`), `label` (Int8, 0 or 1), `timestamp` (seconds UTC, Int64, or Float64
            in all splits when one has fractions of a second), `weight` (Float32, above 0); in file order.
        titles_cleaned: how many titles were changed on reading, by `models.titles.clean_title`.
        files: the file that each split was read from.
        warnings: what is likely a mistake in the data, one sentence each.
        deletions: `user_id`, `deleted_at` of the users who asked to be forgotten; None if the folder names none.
        rows_forgotten: how many rows of theirs were dropped.
    """

    items: pl.DataFrame
    splits: dict[str, pl.DataFrame]
    titles_cleaned: int = 0
    files: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    deletions: pl.DataFrame | None = None
    rows_forgotten: int = 0

    def fingerprint(self) -> str:
        """Return the sha256 (hex) of the content: the same for the same rows in parquet and in CSV."""
        tables = {"items": self.items, **self.splits}
        if self.deletions is not None:
            tables[DELETED_USERS] = self.deletions
        return fingerprint_of(tables)

    def file_of(self, split: str) -> str:
        """Return the name of a split as an error shows it: its file, and the split where the file holds several."""
        file = self.files.get(split, split)
        return file if file.partition(".")[0] == split else f"{file}, split {split}"


def fingerprint_of(tables: Mapping[str, pl.DataFrame]) -> str:
    """Return the sha256 (hex) of named tables of text and numbers."""
    digest = hashlib.sha256()
    for name, frame in tables.items():
        for column in frame.columns:
            digest.update(f"{name}.{column}:{frame.height};".encode())
            digest.update(_canonical_bytes(frame[column]))
    return digest.hexdigest()


def require_learnable(dataset: Dataset) -> None:
    """Refuse data from which no stage can learn, before any stage runs.

    Train needs two users, two items and both labels: with fewer there is nothing to compare. Valid needs both labels:
    without them no AUC is defined, and no checkpoint is better than another.

    Raises:
        DataError: names the file and the counts.
    """
    for split in ("train", "valid"):
        frame = dataset.splits[split]
        positives = int(frame["label"].cast(pl.Int64).sum())
        counted = f"{frame.height:,} rows, {positives:,} of label 1, {frame.height - positives:,} of label 0"
        if positives in (0, frame.height):
            raise DataError(
                f"{dataset.file_of(split)}: holds one label alone ({counted}); give rows of both labels, or another"
                " --positive-above or --split-by"
            )
    train = dataset.splits["train"]
    for column, named in (("user_id", "users"), ("item_id", "items")):
        if (found := train[column].n_unique()) < LEAST_DISTINCT:
            raise DataError(
                f"{dataset.file_of('train')}: holds {train.height:,} rows of {found} of the {named}; training needs at"
                f" least {LEAST_DISTINCT} {named}, and hundreds to learn something: add rows of other {named}"
            )


def _canonical_bytes(column: pl.Series) -> bytes:
    if column.dtype == pl.String:
        # Lengths first: without them "ab", "c" and "a", "bc" would be the same bytes.
        lengths: bytes = column.str.len_bytes().to_numpy().astype("<u4").tobytes()
        return lengths + "".join(column).encode()
    numbers: bytes = column.to_numpy().astype("<f8").tobytes()
    return numbers


def load_dataset(
    folder: Path,
    *,
    positive_above: float | None = None,
    split: SplitRule | None = None,
    columns: Mapping[str, str] = NO_COLUMNS,
    require: Sequence[str] = ("train", "valid"),
) -> Dataset:
    """Read and check a data folder; the format and its rules are in docs/data.md.

    Args:
        folder: holds `items`, and `train`, `valid`, `test` or one `interactions`; each parquet or CSV.
        positive_above: for data with `rating` instead of `label`: ratings above this have label 1.
        split: how one `interactions` is cut by time; None for the default fractions.
        columns: the files' own names of columns, for those that have other names.
        require: the splits that must be there.

    Raises:
        DataError: the first problem found, with how many rows share it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give a folder that holds items and interactions")
    items_path = find_table(folder, "items")
    if items_path is None:
        raw = next((name for name in RAW_FILES if (folder / name).is_file()), None)
        hint = "" if raw is None else f"; {raw} is raw MovieLens data: sella-train prepare movielens {folder} --out DIR"
        raise DataError(f"{folder}: items.parquet or items.csv is missing; found: {_listing(folder)}{hint}")
    items, titles_cleaned = _read_items(items_path, columns)
    paths = _interaction_paths(folder, split)
    frames = {
        name: _read_interactions(path, positive_above, items["item_id"], items_path.name, columns)
        for name, path in paths.items()
    }
    deletions = read_deletions(folder)
    read = sum(frame.height for frame in frames.values())
    if deletions is not None:
        frames = without_deleted(frames, deletions, {name: path.name for name, path in paths.items()})
    forgotten = read - sum(frame.height for frame in frames.values())
    if INTERACTIONS in frames:
        frames = split_by_time(frames[INTERACTIONS], split or SplitRule(), paths[INTERACTIONS].name)
    for name in require:
        if name not in frames:
            raise DataError(
                f"{folder}: split '{name}' is needed but not there; found: {_listing(folder)}; "
                f"add {name}.parquet or {name}.csv"
            )
    files = {name: paths.get(name, paths.get(INTERACTIONS, folder)).name for name in frames}
    frames = _one_timestamp_type(frames)
    return Dataset(items, frames, titles_cleaned, files, _suspicions(frames, files), deletions, forgotten)


def _suspicions(frames: Mapping[str, pl.DataFrame], files: Mapping[str, str]) -> tuple[str, ...]:
    """Return a sentence for each likely mistake in the times of the splits."""
    said = []
    for file in dict.fromkeys(files.values()):
        times = pl.concat(frame["timestamp"] for name, frame in frames.items() if files[name] == file)
        if bool(times.is_between(0, YEAR_1971, closed="left").all()) and bool((times > AN_HOUR).any()):
            said.append(f"{file}: every timestamp lies in 1970; check that they are seconds since 1970")
    for name in ("valid", "test"):
        if "train" in frames and name in frames:
            end = frames["train"]["timestamp"].max()
            early = int((frames[name]["timestamp"] < end).sum())
            if early:
                said.append(
                    f"{files[name]}: {early:,} of {frames[name].height:,} rows of {name} are older than the newest row"
                    " of train; figures on them look back from the future"
                )
    return tuple(said)


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"


def _interaction_paths(folder: Path, split: SplitRule | None) -> dict[str, Path]:
    """Return the files of the interactions: the splits in order, or one under `interactions`."""
    whole = find_table(folder, INTERACTIONS)
    found = {name: path for name in SPLITS if (path := find_table(folder, name))}
    if whole and found:
        others = ", ".join(path.name for path in found.values())
        raise DataError(f"{folder}: holds {whole.name} beside {others}; keep either the whole or its splits")
    if whole:
        return {INTERACTIONS: whole}
    if not found:
        raise DataError(
            f"{folder}: holds no interactions; found: {_listing(folder)}; add train and valid, or one "
            "interactions (.parquet or .csv)"
        )
    if split is not None:
        raise DataError(
            f"{folder}: is split already ({', '.join(found)}); drop the rule for splitting, or give one "
            "interactions file"
        )
    return found


def _read_items(path: Path, columns: Mapping[str, str]) -> tuple[pl.DataFrame, int]:
    table = read_table(path, required=["item_id", "title"], columns=columns)
    ids = parse_ids(table, "item_id")
    table.reject("item_id", ~ids.is_first_distinct(), "stands in an earlier row too", "keep one row an item")
    titles = parse_titles(table, "title")
    return pl.DataFrame([ids, titles]), int((titles != table.frame["title"].cast(pl.String)).sum())


def _read_interactions(
    path: Path, positive_above: float | None, item_ids: pl.Series, items_file: str, columns: Mapping[str, str]
) -> pl.DataFrame:
    table = read_table(path, ["user_id", "item_id", "timestamp"], ["label", "rating", "weight"], columns)
    frame = pl.DataFrame(
        [
            parse_ids(table, "user_id"),
            parse_ids(table, "item_id"),
            _parse_answers(table, path, positive_above, columns),
            parse_timestamps(table, "timestamp"),
            parse_weights(table),
        ]
    )
    unknown = ~frame["item_id"].is_in(item_ids.implode())
    missing = frame["item_id"].filter(unknown).n_unique()
    told = "" if missing == 1 else f"; {missing:,} items are missing"
    table.reject("item_id", unknown, f"is not in {items_file}", f"add the item there or drop the row{told}")
    return frame


def _parse_answers(table: Table, path: Path, positive_above: float | None, columns: Mapping[str, str]) -> pl.Series:
    """Return the labels, from the one of `label` and `rating` that the file has."""
    has_label, has_rating = ("label" in table.frame.columns, "rating" in table.frame.columns)
    if has_label and has_rating:
        raise DataError(f"{table.file}: has both 'label' and 'rating'; keep one of the two columns")
    if has_label and positive_above is not None:
        raise DataError(f"{table.file}: has 'label', which --positive-above does not apply to; drop the option")
    if has_label:
        return parse_labels(table)
    if not has_rating:
        raise missing_column(path, "label", columns)
    if positive_above is None:
        raise DataError(f"{table.file}: has 'rating' but no 'label'; say which are positive, as in --positive-above 3")
    return parse_ratings(table, positive_above)


def _one_timestamp_type(splits: dict[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
    types = {frame.schema["timestamp"] for frame in splits.values()}
    if len(types) == 1:
        return splits
    return {name: frame.with_columns(pl.col("timestamp").cast(pl.Float64)) for name, frame in splits.items()}
