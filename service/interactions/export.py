"""The logs of a fleet as a data folder: what was learned of impressions since, for the next training."""

import csv
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from service.interactions.database import LogFileError, open_to_read

# One row an impression, whichever servers have heard of it: an impression is shown at the earliest time that anyone
# knows, a positive is final, and its like is its earliest positive event.
_JOINED = """
CREATE TABLE joined (
    impression_id TEXT PRIMARY KEY,
    user_id TEXT NOT NULL,
    item_id TEXT NOT NULL,
    state INTEGER NOT NULL,
    shown REAL NOT NULL,
    like_timestamp REAL,
    like_event_id TEXT
) WITHOUT ROWID;
CREATE TABLE deletions (user_id TEXT PRIMARY KEY, deleted_at REAL NOT NULL) WITHOUT ROWID;
"""
# In entries of an earlier version an impression without a request has the event's id alone.
_IMPRESSIONS = """
SELECT impression_id || iif(instr(impression_id, char(31)), '', char(31) || user_id), user_id, item_id, state, shown,
    like_timestamp, like_event_id
FROM impressions ORDER BY impression_id
"""
_JOIN = """
INSERT INTO joined VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
    like_event_id = CASE WHEN (like_timestamp, like_event_id) <= (excluded.like_timestamp, excluded.like_event_id)
        OR excluded.like_timestamp IS NULL THEN like_event_id ELSE excluded.like_event_id END,
    like_timestamp = min(coalesce(like_timestamp, excluded.like_timestamp),
        coalesce(excluded.like_timestamp, like_timestamp)),
    state = max(state, excluded.state),
    shown = min(shown, excluded.shown)
"""
_DELETE = """
INSERT INTO deletions VALUES (?, ?) ON CONFLICT DO UPDATE SET deleted_at = max(deleted_at, excluded.deleted_at)
"""
# An impression whose outcome is known, once: a positive at its like's time, so that a live history and a trained one
# are the same; a negative at the time it was shown. Equal times stand in the order in which live histories have them.
# A server that has not heard of a deletion yet still has what came before it.
_OUTCOMES = """
SELECT user_id, item_id, state = 2, at FROM (
    SELECT user_id, item_id, state, coalesce(like_timestamp, shown) AS at, coalesce(like_event_id, impression_id) AS id
    FROM joined WHERE state > 0
) LEFT JOIN deletions USING (user_id) WHERE deleted_at IS NULL OR at > deleted_at ORDER BY at, id
"""
_QUERIES = {"interactions": _OUTCOMES, "deleted_users": "SELECT user_id, deleted_at FROM deletions ORDER BY user_id"}
ROWS_AT_ONCE = 65_536
CACHE_KB = 16_384  # of the joined impressions; what is more waits on disk
_SCHEMAS: dict[str, dict[str, type[pl.DataType]]] = {
    "interactions": {"user_id": pl.String, "item_id": pl.String, "label": pl.Int8, "timestamp": pl.Float64},
    "deleted_users": {"user_id": pl.String, "deleted_at": pl.Float64},
}
MISSING = "missing_items.csv"


class ExportError(Exception):
    """A folder that the tables cannot be written to, or a table of items that cannot be read."""


@dataclass(frozen=True, slots=True)
class Exported:
    """How many rows the tables have; `missing` items are not in the table of items, None without one."""

    interactions: int
    deletions: int
    missing: int | None = None


def export_logs(paths: Sequence[Path], out: Path, items: Path | None = None) -> Exported:
    """Join the logs of a fleet and write `interactions.parquet` and `deleted_users.parquet` to a folder.

    Impressions that wait for their outcome are left out, and a table without rows is not written. Without interactions
    those of an earlier export leave the folder: their users may have been deleted since. The logs may be in use; each
    is read as of one moment. `items` is a table with a column `item_id`, parquet or CSV: items of the export that are
    not in it are listed in `missing_items.csv` with the number of their rows. Memory does not grow with the logs.

    Raises:
        LogFileError: there is no such log, or it is damaged.
        ExportError: the folder cannot be written, or the table of items not read.
    """
    known = None if items is None else _item_ids(items)
    with ExitStack() as stack:
        logs = [(path, stack.enter_context(closing(open_to_read(path)))) for path in paths]
        for _, log in logs:
            log.execute("BEGIN")
        try:
            out.mkdir(parents=True, exist_ok=True)
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".export.", dir=out)))
            joined = stack.enter_context(_joined(scratch))
            for path, log in logs:
                _read(path, log, joined)
            rows = {name: _write(joined, query, name, scratch) for name, query in _QUERIES.items()}
            for name in _QUERIES:
                if rows[name]:
                    (scratch / f"{name}.parquet").replace(out / f"{name}.parquet")
            if not rows["interactions"]:
                (out / "interactions.parquet").unlink(missing_ok=True)
            missing = None if known is None else _list_missing(out, known)
        except (OSError, pl.exceptions.ComputeError, sqlite3.Error) as error:
            raise ExportError(f"{out}: cannot be written ({error}); make room or give another folder") from error
    return Exported(rows["interactions"], rows["deleted_users"], missing)


@contextmanager
def _joined(scratch: Path) -> Iterator[sqlite3.Connection]:
    """Open an empty table of impressions on disk; what it sorts goes to the same folder."""
    os.close(os.open(scratch / "joined.sqlite", os.O_CREAT | os.O_RDWR, 0o600))
    with closing(sqlite3.connect(scratch / "joined.sqlite", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(f"PRAGMA cache_size = -{CACHE_KB}")
        connection.executescript(_JOINED)
        yield connection


def _read(path: Path, log: sqlite3.Connection, joined: sqlite3.Connection) -> None:
    try:
        for query, into in ((_IMPRESSIONS, _JOIN), ("SELECT user_id, deleted_at FROM deletions", _DELETE)):
            cursor = log.execute(query)
            joined.execute("BEGIN")
            while rows := cursor.fetchmany(ROWS_AT_ONCE):
                joined.executemany(into, rows)
            joined.execute("COMMIT")
    except sqlite3.DatabaseError as error:
        raise LogFileError(f"{path}: cannot be read ({error}); put a backup in its place") from error


def _write(joined: sqlite3.Connection, query: str, name: str, scratch: Path) -> int:
    """Write a table as parquet, a part at a time; return its rows."""
    cursor, number = joined.execute(query), 0
    parts: list[Path] = []
    while rows := cursor.fetchmany(ROWS_AT_ONCE):
        parts.append(scratch / f"{name}.{len(parts)}")
        pl.DataFrame(rows, schema=_SCHEMAS[name], orient="row").write_parquet(parts[-1])
        number += len(rows)
    if parts:
        pl.scan_parquet(parts, glob=False).sink_parquet(scratch / f"{name}.parquet", row_group_size=ROWS_AT_ONCE)
    return number


def _item_ids(items: Path) -> set[str]:
    try:
        if items.suffix == ".parquet":
            table = pl.read_parquet(items, columns=["item_id"])
        else:
            table = pl.read_csv(items, columns=["item_id"], infer_schema=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ExportError(f"{items}: cannot be read ({str(error).splitlines()[0]}); give a table of items") from error
    return set(table["item_id"].cast(pl.String))


def _list_missing(out: Path, known: set[str]) -> int:
    """List the items of the export that are not known, those with most rows first."""
    listed, table = out / MISSING, out / "interactions.parquet"
    listed.unlink(missing_ok=True)
    if not table.exists():
        return 0
    counted = pl.scan_parquet(table).group_by("item_id").len().sort(["len", "item_id"], descending=[True, False])
    missing = [row for row in counted.collect(engine="streaming").iter_rows() if row[0] not in known]
    if missing:
        with listed.open("w", newline="") as file:
            csv.writer(file).writerows([("item_id", "rows"), *missing])
    return len(missing)
