"""`sella-serve publish`: a verified bundle to Redis, with progress."""

from contextlib import closing
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from redis.exceptions import RedisError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.bundle import BundleError
from models.loading import Bundle
from service.features.client import check_url, evicting, evicts, open_publisher, shown
from service.features.codec import PrecisionName, RecordError
from service.features.keys import DEFAULT_PREFIX, Keys
from service.features.publish import Published, Publisher, PublishError, PublishOptions, reason

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
    stage: Annotated[
        bool, typer.Option("--stage", help="Write it and leave the current bundle: for a canary or a shadow.")
    ] = False,
    unstage: Annotated[bool, typer.Option("--unstage", help="Let a bundle expire that was staged.")] = False,
    prefix: Annotated[
        str, typer.Option(help="What every key begins with: the fleet's.", envvar="SELLA_REDIS_PREFIX")
    ] = DEFAULT_PREFIX,
) -> None:
    """Write a bundle's users and items to Redis and make it the current one."""
    try:
        keys = Keys(prefix)
        check_url(redis)
        opened = Bundle.open(bundle)
        with closing(open_publisher(redis)) as client, _progress() as progress:
            if policy := evicting(client.info("memory")):
                typer.echo(f"sella-serve publish: warning: {evicts(policy)}", err=True)
            tasks = {}

            def tick(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = progress.add_task(what)
                progress.update(tasks[what], completed=done, total=total)

            options = PublishOptions(precision, batch, keep_s, again, stage)
            publisher = Publisher(client, opened, options, tick, keys)
            if unstage:
                expiring = publisher.withdraw()
                told = f"bundle {opened.id[:12]} leaves {shown(redis)}: {expiring} keys expire"
            else:
                told = _told(publisher.publish(), opened.id, shown(redis))
    except RedisError as error:
        _give_up(reason(error))
    except (PublishError, BundleError, RecordError, ValueError, OSError) as error:
        _give_up(str(error))
    except KeyboardInterrupt:
        _give_up("interrupted; publish again and it goes on from there")
    typer.echo(told)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _told(published: Published, bundle_id: str, where: str) -> str:
    place = "current" if published.current else "staged"
    if published.already:
        begun = f"bundle {bundle_id[:12]} is {place} on {where} already, and whole; --again writes it anew"
    else:
        begun = (
            f"bundle {bundle_id[:12]} is {place} on {where}: {published.users} users, {published.items} items,"
            f" {published.deleted} deleted users left out"
        )
    repaired = f"; {published.repaired} records were damaged or lost and are written anew" if published.repaired else ""
    return begun + repaired + (f"; {published.expiring} superseded keys expire" if published.expiring else "")


def _give_up(message: str) -> NoReturn:
    typer.echo(f"sella-serve publish: {message}", err=True)
    raise typer.Exit(CANNOT_PUBLISH)
