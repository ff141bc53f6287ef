"""`sella-serve backup`, `restore`, `check` and `export`: what is done with a log beside the server, or without it."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from service.interactions import backup as backups
from service.interactions.backup import BackupError, Contents
from service.interactions.database import LogFileError
from service.interactions.export import MISSING, ExportError, export_logs

CANNOT = 2

Log = Annotated[Path, typer.Option("--interactions", help="The log.", envvar="SELLA_INTERACTIONS")]


def backup(
    interactions: Log,
    out: Annotated[Path, typer.Option(help="The file to write; an earlier backup there is replaced at the end.")],
) -> None:
    """Copy the log, verified, to a file that only its owner may read. The log may be in use."""
    try:
        contents = backups.back_up(interactions, out)
    except (LogFileError, BackupError) as error:
        _give_up("backup", error)
    typer.echo(f"{out}: {_told(contents)}")


def restore(
    interactions: Log,
    backup: Annotated[Path, typer.Option(help="The backup, which stays as it is.")],
) -> None:
    """Put a backup in the place of the log. No server may run on the log."""
    try:
        restored = backups.restore(backup, interactions)
    except (LogFileError, BackupError) as error:
        _give_up("restore", error)
    typer.echo(f"{interactions}: {_told(restored.contents)}")
    if restored.replaced is not None:
        typer.echo(f"{restored.replaced}: the log that was there; remove it when nobody needs it, it names users")
    if restored.deleted is None:
        typer.echo("who was deleted after the backup is not known: the log that was there cannot be read", err=True)
    elif restored.deleted:
        typer.echo(f"{restored.deleted} users who were deleted after the backup are deleted")


def check(interactions: Log) -> None:
    """Verify a log or a backup and tell what it holds. The log may be in use."""
    try:
        contents = backups.check(interactions)
    except LogFileError as error:
        _give_up("check", error)
    typer.echo(f"{interactions}: {_told(contents)}")


def export(
    interactions: Annotated[list[Path], typer.Option(help="A server's log; once for each server of a fleet.")],
    out: Annotated[Path, typer.Option(help="The data folder to write to; its items are yours to add.")],
    items: Annotated[
        Path | None, typer.Option(help=f"A table of items; those of the export that it lacks are listed in {MISSING}.")
    ] = None,
) -> None:
    """Write outcomes and deletions as tables of a data folder, for sella-train. The logs may be in use.

    An impression that several servers have heard of is one row.
    """
    try:
        exported = export_logs(interactions, out, items)
    except (LogFileError, ExportError) as error:
        _give_up("export", error)
    typer.echo(f"{out}: {exported.interactions} interactions with a known outcome, {exported.deletions} deleted users")
    if exported.missing:
        typer.echo(f"{out / MISSING}: {exported.missing} items that {items} lacks; add them there before training")


def _told(contents: Contents) -> str:
    newest = datetime.fromtimestamp(contents.newest, UTC).isoformat(timespec="seconds") if contents.newest else "never"
    return (
        f"sound; {contents.events} events and {contents.expiries} expiries of {contents.users} users,"
        f" {contents.impressions} impressions ({contents.pending} wait for their outcome),"
        f" {contents.deletions} deleted users; last seq {contents.last_seq}, received {newest}"
    )


def _give_up(command: str, error: Exception) -> NoReturn:
    typer.echo(f"sella-serve {command}: {error}", err=True)
    raise typer.Exit(CANNOT)
