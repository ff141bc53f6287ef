"""One table on disk, parquet or CSV, read as it stands: no value is interpreted here."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import polars as pl

from training.data.errors import DataError

SUFFIXES = (".parquet", ".csv")
# CSV rows turned into columns at a time: Python's row lists never exist for the whole file at once.
CSV_ROWS_AT_ONCE = 65_536
# A value quoted in an error is cut here, so that the error stays one readable line.
QUOTED_CHARACTERS = 40


@dataclass(frozen=True)
class Table:
    """The wanted columns of one file, in file order: CSV values are text, parquet values keep their type."""

    file: str
    frame: pl.DataFrame

    def reject(self, column: str, bad: pl.Series, problem: str, mend: str) -> None:
        """Raise for the first row that `bad` marks, with how many rows share the problem; pass when none is.

        Args:
            column: the column whose value is quoted.
            bad: one boolean a row; null counts as bad.
            problem: follows the quoted value, as in "is neither 0 nor 1".
            mend: what to do about it.

        Raises:
            DataError: at least one row is marked.
        """
        marked = bad.fill_null(True).arg_true()
        if len(marked) == 0:
            return
        row = int(marked[0])
        shared = "" if len(marked) == 1 else f" ({len(marked):,} rows have this problem)"
        value = quoted(self.frame[column][row])
        raise DataError(f"{self.file}: column '{column}', row {row + 1}: {value} {problem}; {mend}{shared}")


def quoted(value: object) -> str:
    """Return a value as an error shows it: on one line, cut to a readable length; null and blank by name."""
    if value is None:
        return "null"
    if isinstance(value, str) and len(value) > QUOTED_CHARACTERS:
        return f"{value[:QUOTED_CHARACTERS]!r}…"
    return repr(value) if isinstance(value, str) else str(value)


def find_table(folder: Path, name: str) -> Path | None:
    """Return the file that holds table `name`, or None.

    Raises:
        DataError: the table is there twice, as parquet and as CSV.
    """
    found = [folder / f"{name}{suffix}" for suffix in SUFFIXES if (folder / f"{name}{suffix}").is_file()]
    if len(found) > 1:
        raise DataError(f"{folder}: both {found[0].name} and {found[1].name} are there; remove one of them")
    return found[0] if found else None


def read_table(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """Read the required columns of one file, and those optional ones that it has.

    Raises:
        DataError: the file is unreadable or empty, or a required column is missing.
    """
    read = _read_parquet if path.suffix == ".parquet" else _read_csv
    try:
        frame = read(path, [*required, *optional])
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error}); check the file and its rights") from None
    for column in required:
        if column not in frame.columns:
            raise missing_column(path, column)
    if frame.height == 0:
        raise DataError(f"{path.name}: holds no rows; add rows or remove the file")
    return Table(path.name, frame)


def missing_column(path: Path, column: str) -> DataError:
    """Return the error for a column that the file lacks, with the columns it has."""
    found = _csv_header(path) if path.suffix == ".csv" else list(pl.read_parquet_schema(path))
    return DataError(f"{path.name}: column '{column}' is missing; found: {', '.join(found)}")


def _read_parquet(path: Path, wanted: Sequence[str]) -> pl.DataFrame:
    try:
        found = pl.read_parquet_schema(path)
        return pl.read_parquet(path, columns=[name for name in wanted if name in found])
    # A damaged file can make the reader panic, which polars raises outside `Exception`.
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(f"{path.name}: is not a readable parquet file ({error}); write it again") from None


def _read_csv(path: Path, wanted: Sequence[str]) -> pl.DataFrame:
    """Read wanted columns as text with the standard library's parser.

    A columnar reader would be a little faster, but does not tell the row of a malformed record.
    """
    try:
        header = _csv_header(path)
        taken = [name for name in wanted if name in header]
        for name in taken:
            if header.count(name) > 1:
                raise DataError(f"{path.name}: column '{name}' appears {header.count(name)} times; keep one")
        places = [header.index(name) for name in taken]
        records = _csv_records(path, len(header))
        schema = dict.fromkeys(taken, pl.String)
        chunks = [pl.DataFrame(schema=schema)]
        while rows := list(islice(records, CSV_ROWS_AT_ONCE)):
            columns = {name: [row[place] for row in rows] for name, place in zip(taken, places, strict=True)}
            chunks.append(pl.DataFrame(columns, schema=schema))
        return pl.concat(chunks, rechunk=True)
    except UnicodeDecodeError:
        raise DataError(f"{path.name}: line {_undecodable_line(path)} is not UTF-8; save it as UTF-8") from None


def _csv_header(path: Path) -> list[str]:
    # "utf-8-sig" drops the byte order mark that spreadsheets write: it would become part of the first name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            header = next(csv.reader(file, strict=True), None)
        except csv.Error as error:
            raise DataError(f"{path.name}: header: {error}; name the columns in the first line") from None
    if not header:
        raise DataError(f"{path.name}: is empty; its first line names the columns")
    return header


def _csv_records(path: Path, width: int) -> Iterator[list[str]]:
    """Yield the data records; blank lines are no records, and a record of another width is an error."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        # Strict: an unclosed quote would otherwise swallow the rest of the file without a word.
        reader = csv.reader(file, strict=True)
        row = 0
        try:
            next(reader)
            for record in reader:
                if not record:
                    continue
                row += 1
                if len(record) != width:
                    raise DataError(
                        f"{path.name}: row {row}: {len(record)} fields, but the header has {width}; "
                        "put fields that hold a comma or a line break in double quotes"
                    )
                yield record
        except csv.Error as error:
            raise DataError(
                f"{path.name}: row {row + 1}: {error}; close each double quote and double those inside a field"
            ) from None


def _undecodable_line(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    raise AssertionError(f"{path} decodes line by line but not as a whole")
