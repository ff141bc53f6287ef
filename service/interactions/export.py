"""The log as a data folder: what was learned of impressions since, for the next training."""

import sqlite3
from pathlib import Path

import polars as pl

from service.interactions.database import LogFileError, open_to_read

# An impression whose outcome is known, once: a positive at its like's time, so that a live history and a trained one
# are the same; a negative at the time it was shown. Equal times stand in the order in which live histories have them.
_OUTCOMES = """
SELECT user_id, item_id, state = 2, coalesce(like_timestamp, shown) AS at, coalesce(like_event_id, impression_id) AS id
FROM impressions WHERE state > 0 ORDER BY at, id
"""
ROWS_AT_ONCE = 65_536


class ExportError(Exception):
    """A folder that the tables cannot be written to."""


def export_log(path: Path, out: Path) -> tuple[int, int]:
    """Write `interactions.parquet` and `deleted_users.parquet` to a folder; return how many rows each has.

    Impressions that wait for their outcome are left out, and a table without rows is not written. Without interactions
    those of an earlier export leave the folder: their users may have been deleted since. The log may be in use.

    Raises:
        LogFileError: there is no such log, or it is damaged.
        ExportError: the folder cannot be written.
    """
    connection = open_to_read(path)
    try:
        connection.execute("BEGIN")  # both tables as of one moment
        interactions = _frame(
            connection,
            _OUTCOMES,
            {"user_id": pl.String, "item_id": pl.String, "label": pl.Int8, "timestamp": pl.Float64, "id": pl.String},
        ).drop("id")
        deletions = _frame(
            connection,
            "SELECT user_id, deleted_at FROM deletions ORDER BY user_id",
            {"user_id": pl.String, "deleted_at": pl.Float64},
        )
    except sqlite3.DatabaseError as error:
        raise LogFileError(f"{path}: cannot be read ({error}); put a backup in its place") from error
    finally:
        connection.close()
    _write(out, {"interactions": interactions, "deleted_users": deletions})
    return interactions.height, deletions.height


def _frame(connection: sqlite3.Connection, query: str, schema: dict[str, type[pl.DataType]]) -> pl.DataFrame:
    cursor = connection.execute(query)
    chunks = [pl.DataFrame(schema=schema)]
    while rows := cursor.fetchmany(ROWS_AT_ONCE):
        chunks.append(pl.DataFrame(rows, schema=schema, orient="row"))
    return pl.concat(chunks, rechunk=True)


def _write(out: Path, tables: dict[str, pl.DataFrame]) -> None:
    tables = {name: table for name, table in tables.items() if table.height}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if "interactions" not in tables:
            (out / "interactions.parquet").unlink(missing_ok=True)
        for name, table in tables.items():
            table.write_parquet(out / f".{name}.parquet.partial")
        for name in tables:
            (out / f".{name}.parquet.partial").replace(out / f"{name}.parquet")
    except OSError as error:
        raise ExportError(f"{out}: cannot be written ({error}); make room or give another folder") from error
