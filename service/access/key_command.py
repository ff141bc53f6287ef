"""`sella-serve key`: a new key in a key file."""

import os
import secrets
import tempfile
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from service.access.key_file import read_keys
from service.access.keys import NAME, KeyFileError, parse_keys
from service.ownership import give

CANNOT_MAKE = 2


def key(
    name: Annotated[str, typer.Argument(help="Whose key it is; stands in the log beside what the client asks.")],
    file: Annotated[Path, typer.Option(help="The key file; made if it is not there.")],
    unless_exists: Annotated[
        bool, typer.Option("--unless-exists", help="Leave a file that is there as it is, and print nothing.")
    ] = False,
) -> None:
    """Make a key, add it to a key file and print it. A running service takes it within a second or two."""
    if unless_exists and file.exists():
        return
    try:
        secret = add_key(file, name)
    except (KeyFileError, OSError) as error:
        _give_up(str(error))
    if not unless_exists:
        typer.echo(secret)


def add_key(file: Path, name: str) -> str:
    """Add a new key to a file, which only its owner may read, and return it. The file is replaced whole.

    A file that is there keeps its owner and mode: root must not lock the service out of it.

    Raises:
        KeyFileError: the file would not be a key file, as when the name is there already.
        OSError: it cannot be read or written.
    """
    if not NAME.fullmatch(name):
        raise KeyFileError(f"{name!r} is no name of a key; use 1 to 64 of A-Z a-z 0-9 . _ -")
    file = file.resolve()  # a link stays one
    before = read_keys(file)[1].decode() if file.exists() else ""
    secret = secrets.token_urlsafe(32)
    text = f"{before}{'' if before.endswith(chr(10)) or not before else chr(10)}{name}:{secret}\n"
    parse_keys(text, str(file))
    # mkstemp's file is its owner's alone from the start.
    descriptor, scratch = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "w") as opened:
            opened.write(text)
            opened.flush()
            give(opened.fileno(), file)
            os.fsync(opened.fileno())
        Path(scratch).replace(file)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return secret


def _give_up(message: str) -> NoReturn:
    typer.echo(f"sella-serve key: {message}", err=True)
    raise typer.Exit(CANNOT_MAKE)
