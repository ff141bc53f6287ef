"""One table on disk, parquet or CSV, read as it stands: no value is interpreted here."""

import csv
import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

import polars as pl

from training.data.errors import DataError

TEXT_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
SUFFIXES = (".parquet", *TEXT_SUFFIXES)
# What may stand between the fields of a CSV; where several would do, the first.
DELIMITERS = (",", "\t", ";", "|")
# The columns of the format, which `--columns` may take from columns of other names.
COLUMNS = ("user_id", "item_id", "timestamp", "label", "rating", "weight", "title")
NO_COLUMNS: Mapping[str, str] = {}
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


def parse_columns(text: str | None) -> dict[str, str]:
    """Return the file's name of each column of the format that a command line maps: "user_id=userId,item_id=movieId".

    Raises:
        DataError: the text is not of this form, or names a column that the format does not have.
    """
    given = [part.partition("=") for part in next(csv.reader([text or ""]), [])]
    for name, equals, own in given:
        if name.strip() not in COLUMNS or not equals or not own.strip():
            raise DataError(
                f"--columns {text}: {name + equals + own!r} is no column of {', '.join(COLUMNS)} with the file's own"
                " name; give for example user_id=userId,item_id=movieId"
            )
    names = [name.strip() for name, _, _ in given]
    if len(set(names)) < len(names):
        raise DataError(f"--columns {text}: names a column twice; name each once")
    return {name.strip(): own.strip() for name, _, own in given}


def find_table(folder: Path, name: str) -> Path | None:
    """Return the file that holds table `name`, or None.

    Raises:
        DataError: the table is there twice, as parquet and as CSV.
    """
    found = [folder / f"{name}{suffix}" for suffix in SUFFIXES if (folder / f"{name}{suffix}").is_file()]
    if len(found) > 1:
        raise DataError(f"{folder}: both {found[0].name} and {found[1].name} are there; remove one of them")
    return found[0] if found else None


def read_table(
    path: Path, required: Sequence[str], optional: Sequence[str] = (), columns: Mapping[str, str] = NO_COLUMNS
) -> Table:
    """Read the required columns of one file, and those optional ones that it has.

    `columns` has the file's own name of a column, if it is another; a file without that name may have the usual one.

    Raises:
        DataError: the file is unreadable or empty, or a required column is missing.
    """
    wanted = [*required, *optional]
    try:
        if path.suffix == ".parquet":
            frame = _read_parquet(path, wanted, columns)
        else:
            parts = [part for _, part in csv_parts(path, wanted, columns, require=required)]
            frame = pl.concat(parts, rechunk=True)
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error}); check the file and its rights") from None
    for column in required:
        if column not in frame.columns:
            raise missing_column(path, column, columns)
    if frame.height == 0:
        raise DataError(f"{path.name}: holds no rows; add rows or remove the file")
    return Table(path.name, frame)


def missing_column(path: Path, column: str, columns: Mapping[str, str] = NO_COLUMNS) -> DataError:
    """Return the error for a column that the file lacks, with the columns it has."""
    found = list(pl.read_parquet_schema(path)) if path.suffix == ".parquet" else _csv_header(path, [column])[0]
    named = f"'{columns[column]}' (for '{column}')" if column in columns else f"'{column}'"
    return DataError(f"{path.name}: column {named} is missing; found: {', '.join(found)}")


def own_names(found: Sequence[str], wanted: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Return the file's own name of each wanted column that it has."""
    named = {name: own for name in wanted if (own := columns.get(name, name)) in found}
    return named | {name: name for name in wanted if name not in named and name in found}


def _read_parquet(path: Path, wanted: Sequence[str], columns: Mapping[str, str]) -> pl.DataFrame:
    try:
        named = own_names(list(pl.read_parquet_schema(path)), wanted, columns)
        frame = pl.read_parquet(path, columns=list(dict.fromkeys(named.values())))
        return frame.select(pl.col(own).alias(name) for name, own in named.items())
    # A damaged file can make the reader panic, which polars raises outside `Exception`.
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(f"{path.name}: is not a readable parquet file ({error}); write it again") from None


def csv_parts(
    path: Path,
    wanted: Sequence[str],
    columns: Mapping[str, str] = NO_COLUMNS,
    *,
    require: Sequence[str] = (),
    rows_at_once: int | None = None,
) -> Iterator[tuple[int, pl.DataFrame]]:
    """Yield (first row from 0, wanted columns as text), `rows_at_once` rows at a time; the first part may be empty.

    The standard library parses: a columnar reader is a little faster, but does not tell the row of a malformed record.

    Raises:
        DataError: the file is damaged, not UTF-8 or no CSV.
    """
    size = rows_at_once or CSV_ROWS_AT_ONCE
    try:
        header, delimiter = _csv_header(path, [*(require or wanted), *columns.values()])
        named = own_names(header, wanted, columns)
        for own in named.values():
            if header.count(own) > 1:
                raise DataError(f"{path.name}: column '{own}' appears {header.count(own)} times; keep one")
        places = {name: header.index(own) for name, own in named.items()}
        schema = dict.fromkeys(named, pl.String)
        with _text_of(path) as file:
            records = _csv_records(path, file, len(header), delimiter)
            first = 0
            while rows := list(islice(records, size)):
                yield first, pl.DataFrame({name: [row[at] for row in rows] for name, at in places.items()}, schema)
                first += len(rows)
        if first == 0:
            yield 0, pl.DataFrame(schema=schema)
    except UnicodeDecodeError:
        raise DataError(f"{path.name}: line {_undecodable_line(path)} is not UTF-8; save it as UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path.name}: is not a whole gzip file ({error}); get the file again") from None


@contextmanager
def _text_of(path: Path) -> Iterator[TextIO]:
    # "utf-8-sig" drops the byte order mark that spreadsheets write: it would become part of the first name.
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    else:
        with path.open(encoding="utf-8-sig", newline="") as plain:
            yield plain


def _csv_header(path: Path, wanted: Sequence[str]) -> tuple[list[str], str]:
    """Return the names of the columns and the delimiter: the one that gives most of the wanted columns, then most."""
    best: tuple[tuple[int, int], list[str], str] | None = None
    failure = ""
    for delimiter in DELIMITERS:
        with _text_of(path) as file:
            try:
                header = next(csv.reader(file, delimiter=delimiter, strict=True), None)
            except csv.Error as error:
                failure = str(error)
                continue
        if not header:
            raise DataError(f"{path.name}: is empty; its first line names the columns")
        fits = (sum(name in header for name in wanted), len(header))
        if best is None or fits > best[0]:
            best = fits, header, delimiter
    if best is None:
        raise DataError(f"{path.name}: header: {failure}; name the columns in the first line")
    return best[1], best[2]


def _csv_records(path: Path, file: TextIO, width: int, delimiter: str) -> Iterator[list[str]]:
    """Yield the data records; blank lines are no records, and a record of another width is an error."""
    # Strict: an unclosed quote would otherwise swallow the rest of the file without a word.
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    named = {",": "a comma", "\t": "a tab", ";": "a semicolon", "|": "a pipe"}[delimiter]
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
                    f"put fields that hold {named} or a line break in double quotes"
                )
            yield record
    except csv.Error as error:
        raise DataError(
            f"{path.name}: row {row + 1}: {error}; close each double quote and double those inside a field"
        ) from None


def _undecodable_line(path: Path) -> int:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    raise AssertionError(f"{path} decodes line by line but not as a whole")
