"""Writing a data folder: all of its tables or none."""

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from training.data.errors import DataError
from training.data.split import SPLITS

TABLES = ("items", "interactions", *SPLITS)


def write_folder(out: Path, tables: Mapping[str, pl.DataFrame]) -> None:
    """Write tables as `<name>.parquet`; tables of an earlier run under the same names are replaced.

    Every table is complete on disk before the first is renamed into place. A table without rows is not written:
    reading it would be an error.

    Raises:
        DataError: the folder cannot be made or written, or holds a table that would contradict the new ones.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be made ({error}); give another folder") from None
    tables = {name: table for name, table in tables.items() if table.height}
    written = {f"{name}.parquet" for name in tables}
    for name in (f"{table}{suffix}" for table in TABLES for suffix in (".parquet", ".csv")):
        if name not in written and (out / name).exists():
            raise DataError(f"{out}: holds {name}, which the new tables would contradict; give another folder")
    try:
        for name, table in tables.items():
            table.write_parquet(out / f".{name}.parquet.partial")
        for name in tables:
            (out / f".{name}.parquet.partial").replace(out / f"{name}.parquet")
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{out}: cannot be written ({error}); make room or give another folder") from None
