"""`python -m loadtests.capacity`: the highest rate at which p99 stays within the limit, and latency against load."""

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

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
from loadtests.records import Summary
from loadtests.report import CONSOLE, one_line_errors, show, write
from loadtests.search import Found, Search
from loadtests.trial import Trial
from loadtests.workload import Catalogue, Workload
from models.bundle import read_manifest

POOL = 4096  # different requests; a longer run begins again with the first
ENOUGH = 200  # requests of a step, if three times its length suffices: a p99 of fewer is their slowest


async def measure(trial: Trial, search: Search, seconds: float) -> Found:
    """Search the highest rate that holds on a running service."""
    await trial.warm_up()

    async def step(rate: float) -> Summary:
        summary = await trial.summary(rate, min(max(seconds, ENOUGH / rate), 3 * seconds))
        CONSOLE.print(f"{rate:8.2f}/s: {summary.in_time:.1%} in time, {'holds' if summary.holds else 'does not hold'}")
        return summary

    return await search.highest(step)


async def rate_of(trial: Trial, search: Search, seconds: float) -> float:
    """Return the capacity, for a measurement at a multiple of it.

    Raises:
        ValueError: the search did not find it, so a multiple would mean nothing.
    """
    found = await measure(trial, search, seconds)
    if not found.bracketed:
        tried = sorted(rate for rate, _ in found.steps)
        raise ValueError(
            f"the capacity is not between {tried[0]:g} and {tried[-1]:g}/s; begin nearer with --first-rate, or allow"
            " more --most-steps"
        )
    return found.rate


def main(
    bundle: BundleOption,
    seconds: Annotated[
        float, typer.Option(min=1, max=MAX_SECONDS, help="Length of a step; up to thrice that at low rates.")
    ] = 20.0,
    limit_ms: LimitOption = 500.0,
    deadline_ms: DeadlineOption = None,
    first_rate: Annotated[float, typer.Option(min=0.1, help="Where the search begins, requests a second.")] = 8.0,
    precision: Annotated[float, typer.Option(min=0.01, help="Ratio of rates at which the search ends, less 1.")] = 0.1,
    most_steps: Annotated[int, typer.Option(min=2, max=100, help="Steps at most.")] = 14,
    threads: ThreadsOption = None,
    server_cores: ServerCoresOption = "",
    generator_cores: GeneratorCoresOption = "",
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """Find the highest open-loop rate at which p99 of mixed requests stays within the limit.

    p99 is of all requests that were due: one that was refused or failed counts as slower than any.
    """
    with one_line_errors("capacity"):
        manifest = read_manifest(bundle)
        asks = Workload(Catalogue.read(bundle), seed=seed).asks(POOL)
        with serve_with(bundle, threads, cores_of(server_cores, generator_cores)) as server:
            trial = Trial(server, asks, limit_ms / 1000, deadline_of(deadline_ms, limit_ms), seed)
            found = asyncio.run(measure(trial, Search(first_rate, precision, most_steps), seconds))
        _report(found, limit_ms, trial.deadline_ms, seconds, out, manifest.bundle_id)


def _report(found: Found, limit_ms: float, deadline_ms: int, seconds: float, out: Path | None, bundle_id: str) -> None:
    steps = sorted(found.steps, key=lambda step: step[0])
    show(f"steps of {seconds:g} s; quantiles of scored requests", [summary.row() for _, summary in steps])
    bound = "" if found.bracketed else ", a lower bound: no rate was tried that does not hold"
    CONSOLE.print(f"capacity: {found.rate:.3g} requests/s with p99 <= {limit_ms:g} ms{bound if found.rate else ''}")
    result = {
        "capacity": found.rate,
        "bracketed": found.bracketed,
        "limit_ms": limit_ms,
        "deadline_ms": deadline_ms,
        "seconds_a_step": seconds,
        "steps": [{"rate": rate, "holds": summary.holds, **asdict(summary)} for rate, summary in steps],
    }
    write(out, "capacity", bundle_id, result)
    if out is not None:
        from loadtests.plot import plot_capacity  # matplotlib is of the extra `load`: the search does without

        plot_capacity(out / "capacity.png", steps, found.rate, limit_ms)


if __name__ == "__main__":
    typer.run(main)
