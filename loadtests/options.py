"""The options that every measurement has, and what they mean."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from loadtests.server import Cores, Server, serve

MAX_SECONDS = 3600.0

BundleOption = Annotated[Path, typer.Option(help="The bundle to serve.", exists=True, file_okay=False)]
OutOption = Annotated[Path | None, typer.Option(help="Folder for the results; none are written without it.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of requests and arrivals.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads of the worker; torch decides without it.")]
ServerCoresOption = Annotated[str, typer.Option(help="CPU cores of service and worker, such as 0-2,5; any without it.")]
GeneratorCoresOption = Annotated[str, typer.Option(help="CPU cores of the load generator; any without it.")]
LimitOption = Annotated[float, typer.Option(min=1, help="Milliseconds within which p99 must stay.")]
DeadlineOption = Annotated[
    int | None,
    typer.Option(min=1, max=600_000, help="X-Request-Timeout-Ms of every request; 9/10 of the limit without it."),
]


def parse_cores(text: str) -> tuple[int, ...]:
    """Return the cores of a list such as `0-2,5`.

    Raises:
        typer.BadParameter: it is no such list.
    """
    cores: set[int] = set()
    try:
        for part in filter(None, text.split(",")):
            first, _, last = part.partition("-")
            cores.update(range(int(first), int(last or first) + 1))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no list of cores such as 0-2,5") from error
    return tuple(sorted(cores))


def cores_of(server: str, generator: str) -> Cores:
    """Return the cores of both options."""
    return Cores(parse_cores(server), parse_cores(generator))


def serve_with(
    bundle: Path, threads: int | None, cores: Cores, settings: Mapping[str, str] | None = None
) -> AbstractContextManager[Server]:
    """Run the service of a bundle as the options and other SELLA_ variables say, until the block ends.

    Raises:
        ServerError: it does not start.
    """
    given = {} if threads is None else {"SELLA_ENGINE_THREADS": str(threads)}
    return serve(bundle, cores=cores, settings={**given, **(settings or {})})


def deadline_of(given: int | None, limit_ms: float) -> int:
    """Return the deadline to send. Below the limit, because the answer's way back counts for the client only."""
    return given if given is not None else max(1, int(0.9 * limit_ms))
