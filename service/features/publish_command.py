"""`sella-serve publish`: a verified bundle to Redis, with progress."""

from contextlib import closing
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.bundle import BundleError
from models.loading import Bundle
from service.features.client import open_publisher, shown
from service.features.codec import PrecisionName, RecordError
from service.features.publish import Published, Publisher, PublishError, PublishOptions

CANNOT_PUBLISH = 2


def publish(
    bundle: Annotated[Path, typer.Option(help="The bundle's folder.", envvar="SELLA_BUNDLE")],
    redis: Annotated[str, typer.Option(help="Address of the Redis.", envvar="SELLA_STORE", show_envvar=True)],
    precision: Annotated[
        PrecisionName, typer.Option(help="How vectors are kept; float32 keeps every bit, the others half the memory.")
    ] = "float32",
    batch: Annotated[int, typer.Option(min=1, max=100_000, help="Records of one round trip.")] = 500,
    keep_s: Annotated[
        int, typer.Option(min=0, help="Seconds that the superseded bundle stays for servers that still serve it.")
    ] = 3600,
    again: Annotated[bool, typer.Option("--again", help="Write a bundle anew that is published already.")] = False,
) -> None:
    """Write a bundle's users and items to Redis and make it the current one."""
    try:
        opened = Bundle.open(bundle)
        with closing(open_publisher(redis)) as client, _progress() as progress:
            tasks = {}

            def tick(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = progress.add_task(what)
                progress.update(tasks[what], completed=done, total=total)

            published = Publisher(client, opened, PublishOptions(precision, batch, keep_s, again), tick).publish()
    except (PublishError, BundleError, RecordError, ValueError, OSError) as error:
        _give_up(str(error))
    except KeyboardInterrupt:
        _give_up("interrupted; publish again and it goes on from there")
    typer.echo(_told(published, opened.id, shown(redis)))


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _told(published: Published, bundle_id: str, where: str) -> str:
    if published.already:
        begun = f"bundle {bundle_id[:12]} is published on {where} already; --again writes it anew"
    else:
        begun = (
            f"bundle {bundle_id[:12]} is current on {where}: {published.users} users, {published.items} items,"
            f" {published.deleted} deleted users left out"
        )
    return begun + (f"; {published.expiring} superseded keys expire" if published.expiring else "")


def _give_up(message: str) -> NoReturn:
    typer.echo(f"sella-serve publish: {message}", err=True)
    raise typer.Exit(CANNOT_PUBLISH)
