"""Users who asked to be forgotten: their rows are dropped before anything else is done with them."""

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from training.data.columns import parse_ids, parse_timestamps
from training.data.errors import DataError
from training.data.tables import find_table, read_table

DELETED_USERS = "deleted_users"


def read_deletions(folder: Path) -> pl.DataFrame | None:
    """Return `user_id` and `deleted_at` (Float64, UTC seconds), one row a user with the latest time, sorted by user.

    None if the folder has no such table.

    Raises:
        DataError: the table is there and breaks a rule of docs/data.md.
    """
    path = find_table(folder, DELETED_USERS)
    if path is None:
        return None
    table = read_table(path, ["user_id", "deleted_at"])
    times = parse_timestamps(table, "deleted_at").cast(pl.Float64)
    listed = pl.DataFrame([parse_ids(table, "user_id"), times])
    return listed.group_by("user_id").agg(pl.col("deleted_at").max()).sort("user_id")


def without_deleted(
    frames: Mapping[str, pl.DataFrame], deletions: pl.DataFrame, files: Mapping[str, str]
) -> dict[str, pl.DataFrame]:
    """Return tables without what deleted users did up to their deletion; other rows keep their order.

    Raises:
        DataError: nothing is left of a table; `files` has its name.
    """
    kept = {}
    for name, frame in frames.items():
        marked = frame.join(deletions, on="user_id", how="left", maintain_order="left")
        # What came later is of a user who has come back.
        gone = (marked["timestamp"] <= marked["deleted_at"]).fill_null(False)
        kept[name] = frame.filter(~gone)
        if kept[name].height == 0:
            raise DataError(f"{files[name]}: holds rows of deleted users alone; add rows or remove the file")
    return kept
