"""Results as a table for the reader and as JSON for the documents."""

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from loadtests.server import ServerError
from models.bundle import BundleError

CONSOLE = Console(width=max(100, get_terminal_size().columns))  # a table in a file needs no folding


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of the same columns as a table."""
    table = Table(title=title, title_justify="left")
    for column in rows[0] if rows else ():
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    CONSOLE.print(table)


def write(out: Path | None, name: str, bundle_id: str, result: Mapping[str, Any]) -> None:
    """Write `name`.json with the command and the machine that made it, if there is a folder to write to."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    whole = {"command": _command(name), "bundle_id": bundle_id, "machine": machine(), **result}
    path.write_text(json.dumps(whole, indent=2, allow_nan=False) + "\n")
    CONSOLE.print(f"written: {path}")


def machine() -> dict[str, Any]:
    """Return what figures depend on besides the code."""
    return {
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


@contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Turn what a user can mend into one line and exit code 2."""
    try:
        yield
    except (ServerError, BundleError, ValidationError, ValueError, OSError) as error:
        typer.echo(f"{command}: {error}", err=True)
        raise typer.Exit(2) from error


def _command(name: str) -> str:
    return " ".join(["python", "-m", f"loadtests.{name}", *sys.argv[1:]])


def _processor() -> str:
    """Return the processor's name: Linux keeps it in a file, other systems tell Python."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _text(value: object) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )
