"""`python -m loadtests.fairness`: what a /rank of 1,000 candidates does to a /score of one pair beside it."""

import asyncio
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from loadtests.arrivals import ClosedLoop, OpenLoop, poisson
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
from loadtests.report import one_line_errors, show, write
from loadtests.sender import Sender
from loadtests.server import Server
from loadtests.workload import Ask, Catalogue, Mix, Workload
from models.bundle import read_manifest

LIMIT_S = 0.5
POOL = 512
LARGE_POOL = 16


@dataclass(frozen=True)
class Fairness:
    """The small requests alone and beside the large ones, and what became of the large ones."""

    alone: Summary
    beside: Summary
    large_sent: int
    large_scored: int
    large_p50_ms: float | None

    def rows(self) -> list[dict[str, Any]]:
        """Return both as lines of a table."""
        return [{"/score of 1": name, **one.row()} for name, one in (("alone", self.alone), ("beside", self.beside))]


@dataclass(frozen=True)
class Neighbours:
    """Small requests that come at a rate, and large ones of which one is always under way."""

    server: Server
    small: list[Ask]
    large: list[Ask]
    rate: float
    seconds: float
    seed: int = 0

    async def measure(self) -> Fairness:
        """Measure the small ones alone, then beside the large ones."""
        async with Sender(self.server.url) as send, Sender(self.server.url, timeout_s=600, pools=1) as send_large:
            await ClosedLoop(send, self.small).run(60, 20)
            await ClosedLoop(send_large, self.large).run(600, 1)
            alone = await self._small(send)
            large = ClosedLoop(send_large, self.large)
            beside, rankings = await asyncio.gather(self._small(send), large.run(self.seconds))
        return Fairness(
            alone=summarize(alone, self.seconds, LIMIT_S),
            beside=summarize(beside, self.seconds, LIMIT_S),
            large_sent=len(rankings),
            large_scored=sum(one.ok for one in rankings),
            large_p50_ms=quantile_ms([one.latency_s for one in rankings if one.ok], 0.5),
        )

    async def _small(self, send: Sender) -> list[Record]:
        return await OpenLoop(send, self.small, grace_s=60).run(poisson(self.rate, self.seconds, self.seed))


def main(
    bundle: BundleOption,
    seconds: Annotated[float, typer.Option(min=1, max=MAX_SECONDS, help="Length of each of the two runs.")] = 20.0,
    rate: Annotated[float, typer.Option(min=0.1, max=1000, help="/score of one pair, a second.")] = 10.0,
    size: Annotated[int, typer.Option(min=1, max=1000, help="Candidates of the large /rank.")] = 1000,
    threads: ThreadsOption = None,
    server_cores: ServerCoresOption = "",
    generator_cores: GeneratorCoresOption = "",
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """Compare the latency of small requests alone and beside large ones.

    A catalogue of fewer items than the large request wants is filled up with unknown items, which cost more.
    """
    with one_line_errors("fairness"):
        manifest = read_manifest(bundle)
        catalogue = Catalogue.read(bundle)
        mix = Mix(rank_share=0, sizes=(1,), size_weights=(1,), sent_share=0, unknown_share=0)
        workload = Workload(catalogue, mix, seed)
        large = [workload.ranking(number, size) for number in range(LARGE_POOL)]
        with serve_with(bundle, threads, cores_of(server_cores, generator_cores)) as server:
            seen = asyncio.run(Neighbours(server, workload.asks(POOL), large, rate, seconds, seed).measure())
        show(f"beside /rank of {size}, one always under way", seen.rows())
        show("the large ones", [{"sent": seen.large_sent, "scored": seen.large_scored, "p50 ms": seen.large_p50_ms}])
        result = {"seconds": seconds, "rate": rate, "size": size, "catalogue": len(catalogue.item_ids)}
        write(out, "fairness", manifest.bundle_id, {**result, **asdict(seen)})


if __name__ == "__main__":
    typer.run(main)
