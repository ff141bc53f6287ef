"""The one error of this package: a problem in the data, told in one line."""

import re

from pydantic import ValidationError


class DataError(ValueError):
    """A problem in the data: one line that names file, column, row and mend.

    Rows are counted from 1 and the header of a CSV is not counted: row 1 is the first row of data.
    """

    def __init__(self, message: str) -> None:
        # Parser messages that are quoted in ours may hold line breaks; a log line must not.
        super().__init__(" ".join(message.splitlines()))


def first_problem(refusal: ValidationError) -> str:
    """Return what pydantic found first, without its prefixes: "users: Input should be greater than …"."""
    first = refusal.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def disk_problem(error: Exception) -> str | None:
    """Return what the operating system refused, such as a disk that is full, on one line; None for other errors.

    Libraries wrap the operating system's errors in their own, with "(os error 28)" at the end of the text.
    """
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError) or re.search(r"\(os error \d+\)", text) else None
