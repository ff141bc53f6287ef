"""Raw files of published data sets, line by line: no file is ever in memory as a whole."""

import ast
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

from training.data.errors import DataError

# Opens a raw file for reading bytes. Passed in, so that a command can watch how far the reading is.
OpenRaw = Callable[[Path], IO[bytes]]

_GZIP_MAGIC = b"\x1f\x8b"


def open_raw(path: Path) -> IO[bytes]:
    """Open a file for reading bytes."""
    return path.open("rb")


def require_files(*paths: Path) -> None:
    """Check that raw files are there before hours are spent on the first of them.

    Raises:
        DataError: one is not.
    """
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file; unpack the raw data set there or give its path")


def read_lines(path: Path, encoding: str, open_file: OpenRaw = open_raw) -> Iterator[tuple[int, str]]:
    """Yield (row from 1, line without its end) of a text file, plain or gzip; blank lines are skipped.

    Raises:
        DataError: the file is not there, is damaged, or not in this encoding.
    """
    require_files(path)
    row = 0
    try:
        with path.open("rb") as start:
            zipped = start.read(2) == _GZIP_MAGIC
        with open_file(path) as file, gzip.open(file) if zipped else nullcontext(file) as lines:
            for line in lines:
                row += 1
                if text := line.decode(encoding).rstrip("\r\n"):
                    yield row, text
    except UnicodeDecodeError:
        raise DataError(f"{path.name}: row {row} is not {encoding}; get the file again") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path.name}: row {row + 1}: cannot be read ({error}); get the file again") from None


def text_encoding(path: Path) -> str:
    """Return "utf-8-sig" if a file's accents are UTF-8, else "latin-1": copies of old data sets circulate in both.

    Latin-1 never fails, so it would read UTF-8 without a word; text in Latin-1 with accents is hardly ever UTF-8.
    """
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return "latin-1"
    return "latin-1" if content.isascii() else "utf-8-sig"


def read_json_lines(path: Path, open_file: OpenRaw = open_raw) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (row from 1, object) of a JSON lines file, plain or gzip; a line may be a Python literal instead.

    The metadata of Amazon's release of 2014 are Python literals.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object.
    """
    for row, line in read_lines(path, "utf-8", open_file):
        try:
            record = json.loads(line)
        except ValueError as error:
            record = _literal(line)
            if record is None:
                raise DataError(f"{path.name}: row {row} is not JSON ({error}); give one object a line") from None
        if not isinstance(record, dict):
            raise DataError(f"{path.name}: row {row} is not a JSON object; give one object a line")
        yield row, record


def _literal(line: str) -> Any:
    """Return the dictionary that a line of Python writes, without running it; None if it is none."""
    try:
        return ast.literal_eval(line) if line.startswith("{'") else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
