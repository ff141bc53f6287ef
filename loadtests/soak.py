"""`python -m loadtests.soak`: twenty minutes at four fifths of capacity; memory should be flat and nothing fail."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import typer

from loadtests import capacity
from loadtests.arrivals import OpenLoop, poisson
from loadtests.memory import MIB, MemorySamples, slope_mib_a_minute, watched_memory
from loadtests.options import (
    MAX_SECONDS,
    BundleOption,
    DeadlineOption,
    GeneratorCoresOption,
    LimitOption,
    OutOption,
    SeedOption,
    ServerCoresOption,
    ThreadsOption,
    cores_of,
    deadline_of,
    serve_with,
)
from loadtests.records import OK, Record, Summary, summarize
from loadtests.report import CONSOLE, one_line_errors, show, write
from loadtests.search import Search
from loadtests.sender import Sender
from loadtests.server import Server
from loadtests.trial import Trial
from loadtests.workload import Ask, Catalogue, Workload
from models.bundle import read_manifest

# A leak of one request's objects, some kilobytes, at ten requests a second is several MiB a minute.
FLAT_MIB_A_MINUTE = 1.0
SECONDS_A_REPORT = 1.0  # clients send what happened in batches


@dataclass(frozen=True)
class Soak:
    """What a long time at a steady load showed."""

    capacity: float
    summary: Summary
    interactions: int  # events sent beside the scores
    interactions_failed: int
    server_mib: tuple[float, float]  # first and last sample
    worker_mib: tuple[float, float]
    server_slope_mib_a_minute: float | None
    worker_slope_mib_a_minute: float | None
    queue_tokens_after: float

    @property
    def passes(self) -> bool:
        """Whether nothing failed and neither process grew in the second half."""
        slopes = (self.server_slope_mib_a_minute, self.worker_slope_mib_a_minute)
        flat = all(slope is not None and slope <= FLAT_MIB_A_MINUTE for slope in slopes)
        return flat and not self.summary.failed and not self.interactions_failed and not self.queue_tokens_after

    def rows(self) -> list[dict[str, Any]]:
        """Return it as a table of what was asked and what was seen."""
        memory = [f"{first:.0f} -> {last:.0f} MiB" for first, last in (self.server_mib, self.worker_mib)]
        slopes = [self.server_slope_mib_a_minute, self.worker_slope_mib_a_minute]
        told = [
            ("interactions sent, failed", f"{self.interactions}, {self.interactions_failed}"),
            ("memory of the server", memory[0]),
            ("memory of the worker", memory[1]),
            ("slopes, second half, MiB/min", " ".join("-" if one is None else f"{one:+.2f}" for one in slopes)),
            ("queue gauge after it, tokens", self.queue_tokens_after),
            ("verdict", "flat, nothing failed" if self.passes else "DOES NOT PASS"),
        ]
        return [{"figure": name, "value": value} for name, value in told]


def figures(
    capacity_rate: float,
    summary: Summary,
    reports: Sequence[Record],
    events: int,
    memory: MemorySamples,
    queue_tokens_after: float,
) -> Soak:
    """Compute the figures of a run; `reports` are the batches of interactions, `events` what they held."""
    return Soak(
        capacity=capacity_rate,
        summary=summary,
        interactions=events,
        interactions_failed=sum(one.answer.status != OK for one in reports),
        server_mib=(memory.server[0] / MIB, memory.server[-1] / MIB),
        worker_mib=(memory.worker[0] / MIB, memory.worker[-1] / MIB),
        server_slope_mib_a_minute=slope_mib_a_minute(memory.seconds, memory.server),
        worker_slope_mib_a_minute=slope_mib_a_minute(memory.seconds, memory.worker),
        queue_tokens_after=queue_tokens_after,
    )


def reports_of(catalogue: Catalogue, seconds: float, events_a_second: float, seed: int) -> list[Ask]:
    """Return batches of interactions, one a second: some impressions, most with their outcome."""
    rng = np.random.default_rng(seed)
    began = time.time()
    batches = []
    for second in range(round(seconds / SECONDS_A_REPORT)):
        events: list[Mapping[str, Any]] = [
            {
                "event_id": f"soak-{seed}-{second}-{number}",
                "user_id": str(rng.choice(catalogue.user_ids)),
                "item_id": str(rng.choice(catalogue.item_ids)),
                "label": [True, False, None][int(rng.choice(3, p=(0.2, 0.5, 0.3)))],
                "timestamp": began + second * SECONDS_A_REPORT,
            }
            for number in range(int(rng.poisson(events_a_second * SECONDS_A_REPORT)))
        ]
        if events:
            batches.append(Ask("/interactions", json.dumps({"interactions": events}).encode(), len(events)))
    return batches


async def measure(
    server: Server,
    trial: Trial,
    reports: Sequence[Ask],
    search: Search,
    step_s: float,
    seconds: float,
    share: float,
) -> Soak:
    """Find the capacity, then offer a share of it for a long time, interactions beside.

    Raises:
        ValueError: the search did not find the capacity.
    """
    capacity_rate = await capacity.rate_of(trial, search, step_s)
    CONSOLE.print(f"capacity {capacity_rate:.3g}/s; now {share:.0%} of that for {seconds:g} s")
    with watched_memory(server.pid) as memory:
        async with Sender(server.url) as send:
            reporting = OpenLoop(send, reports).run(poisson(len(reports) / seconds, seconds, trial.seed))
            records, reported = await asyncio.gather(trial.run(share * capacity_rate, seconds), reporting)
    summary = summarize(records, seconds, trial.limit_s)
    events = sum(ask.candidates for ask in reports)
    return figures(capacity_rate, summary, reported, events, memory, server.settle())


def main(
    bundle: BundleOption,
    seconds: Annotated[float, typer.Option(min=1, max=MAX_SECONDS, help="Length of the soak.")] = 1200.0,
    share: Annotated[float, typer.Option(min=0.05, max=1, help="Offered rate in capacities.")] = 0.8,
    step_seconds: Annotated[float, typer.Option(min=1, max=MAX_SECONDS, help="Length of a step of the search.")] = 20.0,
    events: Annotated[float, typer.Option(min=0.1, max=1000, help="Interactions a second beside the scores.")] = 5.0,
    cache_mb: Annotated[
        int, typer.Option(min=0, help="SELLA_CACHE_MB: small, so that the cache is full long before the half.")
    ] = 64,
    limit_ms: LimitOption = 500.0,
    deadline_ms: DeadlineOption = None,
    first_rate: Annotated[float, typer.Option(min=0.1, help="Where the search for the capacity begins.")] = 8.0,
    most_steps: Annotated[int, typer.Option(min=2, max=100, help="Steps of that search at most.")] = 14,
    threads: ThreadsOption = None,
    server_cores: ServerCoresOption = "",
    generator_cores: GeneratorCoresOption = "",
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """Measure the capacity, then memory, errors and latency at a share of it; exit code 1 if it does not pass."""
    with one_line_errors("soak"):
        manifest = read_manifest(bundle)
        catalogue = Catalogue.read(bundle)
        asks = Workload(catalogue, seed=seed).asks(capacity.POOL)
        reports = reports_of(catalogue, seconds, events, seed)
        settings = {"SELLA_CACHE_MB": str(cache_mb)}
        with serve_with(bundle, threads, cores_of(server_cores, generator_cores), settings) as server:
            trial = Trial(server, asks, limit_ms / 1000, deadline_of(deadline_ms, limit_ms), seed)
            search = Search(first_rate, most_steps=most_steps)
            seen = asyncio.run(measure(server, trial, reports, search, step_seconds, seconds, share))
        show(f"{share:.0%} of capacity for {seconds:g} s", [seen.summary.row()])
        show("after it", seen.rows())
        result = {"seconds": seconds, "share": share, "limit_ms": limit_ms, "cache_mb": cache_mb}
        write(out, "soak", manifest.bundle_id, {**result, **asdict(seen), "passes": seen.passes})
    if not seen.passes:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
