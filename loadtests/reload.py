"""`python -m loadtests.reload`: what a change of bundles under load does to the requests beside it."""

import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from loadtests.arrivals import OpenLoop, poisson
from loadtests.options import (
    MAX_SECONDS,
    BundleOption,
    GeneratorCoresOption,
    OutOption,
    SeedOption,
    ServerCoresOption,
    ThreadsOption,
    cores_of,
    serve_with,
)
from loadtests.records import Record, Summary, quantile_ms, summarize
from loadtests.report import CONSOLE, one_line_errors, show, write
from loadtests.sender import Sender
from loadtests.server import Server, ServerError
from loadtests.trial import Trial
from loadtests.variant import write_variant
from loadtests.workload import Ask, Catalogue, Workload
from models.bundle import read_manifest

LIMIT_S = 30.0  # the service's own deadline: whatever is answered later has failed
POOL = 4096
SETTLE_S = 1.0  # after a switch, until what drained has ended; it belongs to the change


@dataclass(frozen=True)
class Change:
    """One change, in seconds after the run began."""

    began: float
    ended: float


@dataclass(frozen=True)
class Reload:
    """Requests outside and during changes."""

    outside: Summary
    during: Summary
    changes: list[float]  # seconds that each took
    ratio: float | None  # of p99 during changes to p99 outside

    def rows(self) -> list[dict[str, Any]]:
        """Return both as lines of a table."""
        return [{"requests": name, **one.row()} for name, one in (("outside", self.outside), ("during", self.during))]


def split(records: Sequence[Record], changes: Sequence[Change], seconds: float) -> Reload:
    """Sort requests by whether any of their time fell into a change."""

    def touched(record: Record) -> bool:
        return any(record.scheduled < one.ended and record.done > one.began for one in changes)

    changing = sum(one.ended - one.began for one in changes)
    during = [record for record in records if touched(record)]
    outside = [record for record in records if not touched(record)]
    p99s = [quantile_ms([one.latency_s for one in part if one.ok], 0.99) for part in (during, outside)]
    return Reload(
        summarize(outside, seconds - changing, LIMIT_S),
        summarize(during, changing, LIMIT_S),
        [one.ended - one.began for one in changes],
        p99s[0] / p99s[1] if p99s[0] is not None and p99s[1] else None,
    )


async def measure(
    server: Server, asks: Sequence[Ask], rate: float, bundles: Sequence[Path], gap_s: float, seed: int
) -> Reload:
    """Change to each bundle in turn, `gap_s` apart, under an open loop that goes on throughout."""
    await Trial(server, asks, LIMIT_S, int(1000 * LIMIT_S)).warm_up()
    changes: list[Change] = []
    async with Sender(server.url, timeout_s=2 * LIMIT_S) as send:
        started = time.monotonic()
        load = asyncio.create_task(_load(OpenLoop(send, asks, grace_s=LIMIT_S), rate, gap_s, seed, changing := []))
        try:
            for bundle in bundles:
                await asyncio.sleep(gap_s)
                began = time.monotonic() - started
                await _change(server, bundle)
                await asyncio.sleep(SETTLE_S)
                changes.append(Change(began, time.monotonic() - started))
            await asyncio.sleep(gap_s)
        finally:
            changing.append(True)
        records = await load
    return split(records, changes, max(record.scheduled for record in records))


async def _load(loop: OpenLoop, rate: float, slice_s: float, seed: int, ended: list[bool]) -> list[Record]:
    """Send slices of arrivals until told to end; how long changes take is not known before."""
    started = time.monotonic()
    pending: list[tuple[float, asyncio.Task[list[Record]]]] = []
    records: list[Record] = []
    offset = 0.0
    while not ended:
        pending.append((offset, asyncio.create_task(loop.run(poisson(rate, slice_s, seed + len(pending))))))
        offset += slice_s
        await asyncio.sleep(max(0.0, started + offset - time.monotonic()))
    for begun, task in pending:
        records += [
            Record(one.scheduled + begun, one.sent + begun, one.done + begun, one.answer, one.candidates)
            for one in await task
        ]
    return records


async def _change(server: Server, bundle: Path) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=1800, trust_env=False) as client:
        answer = await client.post("/admin/bundle", json={"bundle": str(bundle)})
    if answer.status_code != httpx.codes.OK:
        raise ServerError(f"the change to {bundle} was refused: {answer.text}")


def main(
    bundle: BundleOption,
    other: Annotated[
        Path | None, typer.Option(help="The bundle to change to and back; without it a copy with other weights.")
    ] = None,
    equal_weights: Annotated[bool, typer.Option(help="Make the copy with equal merged weights.")] = False,
    rate: Annotated[float, typer.Option(min=0.1, help="Requests a second.")] = 4.0,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Changes there and back.")] = 3,
    gap_s: Annotated[float, typer.Option(min=1, max=MAX_SECONDS, help="Seconds between two changes.")] = 15.0,
    threads: ThreadsOption = None,
    server_cores: ServerCoresOption = "",
    generator_cores: GeneratorCoresOption = "",
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """Change bundles there and back under an open loop, and compare p99 during changes with p99 outside them."""
    with one_line_errors("reload"), tempfile.TemporaryDirectory(prefix="sella-reload-") as folder:
        if other is None:
            other = Path(folder) / "other"
            write_variant(bundle, other, other_weights=not equal_weights)
        asks = Workload(Catalogue.read(bundle), seed=seed).asks(POOL)
        settings = {"SELLA_BUNDLE_FOLDER": "/"}
        with serve_with(bundle, threads, cores_of(server_cores, generator_cores), settings) as server:
            turns = [other.resolve(), bundle.resolve()] * rounds
            found = asyncio.run(measure(server, asks, rate, turns, gap_s, seed))
        show(f"{len(turns)} changes under {rate:g} requests/s; quantiles of scored requests", found.rows())
        ratio = "-" if found.ratio is None else f"{found.ratio:.2f}"
        CONSOLE.print(f"p99 during over p99 outside: {ratio}; a change took {max(found.changes):.1f} s at most")
        result = {"rate": rate, "other": read_manifest(other).bundle_id, "equal_weights": equal_weights}
        write(out, "reload", read_manifest(bundle).bundle_id, {**result, **asdict(found)})


if __name__ == "__main__":
    typer.run(main)
