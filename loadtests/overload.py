"""`python -m loadtests.overload`: what the service still does at three times what it can."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from loadtests import capacity
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
from loadtests.records import Record, Summary, quantile_ms, summarize
from loadtests.report import CONSOLE, one_line_errors, show, write
from loadtests.scrape import Histogram
from loadtests.search import Search
from loadtests.server import Server
from loadtests.trial import Trial
from loadtests.workload import Catalogue, Workload
from models.bundle import read_manifest

REFUSED_WITHIN_S = 0.05
REFUSAL_SECONDS = "sella_refusal_seconds"


@dataclass(frozen=True)
class Overload:
    """What a time of overload showed."""

    capacity: float
    summary: Summary
    goodput_of_capacity: float
    refusals: int  # 429s, as the server counted them
    refusals_within_50_ms: float | None
    refusal_p99_at_most_ms: float | None  # a histogram's bound; None also if it is over the last one
    refusal_client_p99_ms: float | None  # as the generator saw it: the network and its own lateness counted in
    server_mib: tuple[float, float]  # first and last sample
    worker_mib: tuple[float, float]
    server_slope_mib_a_minute: float | None
    worker_slope_mib_a_minute: float | None
    queue_tokens_after: float

    def rows(self) -> list[dict[str, Any]]:
        """Return it as a table of what was asked and what was seen."""
        within = self.refusals_within_50_ms
        slopes = [self.server_slope_mib_a_minute, self.worker_slope_mib_a_minute]
        memory = [f"{first:.0f} -> {last:.0f} MiB" for first, last in (self.server_mib, self.worker_mib)]
        told = [
            ("goodput of capacity", f"{self.goodput_of_capacity:.1%}"),
            ("refused (429)", str(self.refusals)),
            ("decided within 50 ms by the server", "-" if within is None else f"{within:.2%}"),
            ("p99 of deciding, at most ms", self.refusal_p99_at_most_ms),
            ("p99 of a refusal for the client, ms", self.refusal_client_p99_ms),
            ("memory of the server", memory[0]),
            ("memory of the worker", memory[1]),
            ("slopes, second half, MiB/min", " ".join("-" if one is None else f"{one:+.2f}" for one in slopes)),
            ("queue gauge after it, tokens", self.queue_tokens_after),
        ]
        return [{"figure": name, "value": value} for name, value in told]


def figures(
    records: Sequence[Record],
    seconds: float,
    limit_s: float,
    capacity_rate: float,
    refusals: Histogram,
    memory: MemorySamples,
    queue_tokens_after: float,
) -> Overload:
    """Compute the figures of a run; `refusals` is the server's own histogram over it."""
    summary = summarize(records, seconds, limit_s)
    p99 = refusals.quantile_at_most(0.99)
    return Overload(
        capacity=capacity_rate,
        summary=summary,
        goodput_of_capacity=summary.goodput / capacity_rate,
        refusals=refusals.count,
        refusals_within_50_ms=refusals.share_within(REFUSED_WITHIN_S) if refusals.count else None,
        refusal_p99_at_most_ms=None if p99 is None or p99 == float("inf") else 1000 * p99,
        refusal_client_p99_ms=quantile_ms([one.latency_s for one in records if one.answer.status == 429], 0.99),
        server_mib=(memory.server[0] / MIB, memory.server[-1] / MIB),
        worker_mib=(memory.worker[0] / MIB, memory.worker[-1] / MIB),
        server_slope_mib_a_minute=slope_mib_a_minute(memory.seconds, memory.server),
        worker_slope_mib_a_minute=slope_mib_a_minute(memory.seconds, memory.worker),
        queue_tokens_after=queue_tokens_after,
    )


async def measure(
    server: Server, trial: Trial, search: Search, step_s: float, seconds: float, times: float
) -> Overload:
    """Find the capacity, then offer a multiple of it.

    Raises:
        ValueError: the search did not find the capacity, so a multiple of it would mean nothing.
    """
    capacity_rate = await capacity.rate_of(trial, search, step_s)
    CONSOLE.print(f"capacity {capacity_rate:.3g}/s; now {times:g} times that for {seconds:g} s")
    before = server.scrape()
    with watched_memory(server.pid) as memory:
        records = await trial.run(times * capacity_rate, seconds)
    queue = server.settle()
    refusals = server.scrape().histogram_since(before, REFUSAL_SECONDS)
    return figures(records, seconds, trial.limit_s, capacity_rate, refusals, memory, queue)


def main(
    bundle: BundleOption,
    seconds: Annotated[float, typer.Option(min=1, max=MAX_SECONDS, help="Length of the overload.")] = 60.0,
    times: Annotated[float, typer.Option(min=1, max=20, help="Offered rate in capacities.")] = 3.0,
    step_seconds: Annotated[float, typer.Option(min=1, max=MAX_SECONDS, help="Length of a step of the search.")] = 20.0,
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
    """Measure the capacity, then goodput, refusals, memory and queue at a multiple of it."""
    with one_line_errors("overload"):
        manifest = read_manifest(bundle)
        asks = Workload(Catalogue.read(bundle), seed=seed).asks(capacity.POOL)
        with serve_with(bundle, threads, cores_of(server_cores, generator_cores)) as server:
            trial = Trial(server, asks, limit_ms / 1000, deadline_of(deadline_ms, limit_ms), seed)
            seen = asyncio.run(
                measure(server, trial, Search(first_rate, most_steps=most_steps), step_seconds, seconds, times)
            )
        show(f"{times:g} times capacity for {seconds:g} s", [seen.summary.row()])
        show("under overload", seen.rows())
        result = {"seconds": seconds, "times": times, "limit_ms": limit_ms, "deadline_ms": trial.deadline_ms}
        write(out, "overload", manifest.bundle_id, {**result, **asdict(seen)})


if __name__ == "__main__":
    typer.run(main)
