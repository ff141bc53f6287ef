"""`python -m loadtests.overhead`: what a request costs besides its forward, and HTTP beside the engine alone."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Annotated, Any

import typer

from loadtests.arrivals import ClosedLoop
from loadtests.engine import EngineAlone
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
from loadtests.records import Record, quantile_ms
from loadtests.report import one_line_errors, show, write
from loadtests.sender import Sender
from loadtests.server import Cores, Server, ServerError, pinned
from loadtests.workload import Ask, Catalogue, Mix, Workload
from models.bundle import read_manifest
from models.packs import ScoringGroup
from service.settings import load_settings

CALLERS = 16  # enough that the engine never waits for a request
REQUESTS = 64  # different ones
WARM_UP = 8


@dataclass(frozen=True)
class Overhead:
    """Medians over single requests, in milliseconds; every figure is of the same requests."""

    requests: int
    client_ms: float  # from sending to the last byte
    total_ms: float  # the service's own, from the read body to the scores
    forward_ms: float  # the service's own: from dispatch to the scores, the way to the worker and back counted in
    alone_ms: float  # the same forwards in this process
    service_ms: float  # median of total less forward
    http_ms: float  # median of client less total: HTTP, JSON, and the client itself
    around_ms: float  # median of client less forward
    everything_ms: float  # median of client less the same forward alone: the way to the worker counted too


@dataclass(frozen=True)
class Throughput:
    """Candidates a second of the same requests, rounds of both in turn."""

    alone: list[float]
    http: list[float]

    @property
    def ratio(self) -> float:
        """HTTP's share of the engine's own, median of the rounds."""
        return median(http / alone for http, alone in zip(self.http, self.alone, strict=True))


def overhead(records: Sequence[Record], alone_s: Sequence[float]) -> Overhead:
    """Compute the medians from single requests and from the same forwards alone."""
    legs = [record.answer.timings for record in records]

    def middle(values: Sequence[float]) -> float:
        return quantile_ms(values, 0.5) or 0.0

    client = [record.latency_s for record in records]
    total, forward = ([leg[name] for leg in legs] for name in ("total", "forward"))
    return Overhead(
        requests=len(records),
        client_ms=middle(client),
        total_ms=middle(total),
        forward_ms=middle(forward),
        alone_ms=middle(alone_s),
        service_ms=middle([whole - part for whole, part in zip(total, forward, strict=True)]),
        http_ms=middle([whole - part for whole, part in zip(client, total, strict=True)]),
        around_ms=middle([whole - part for whole, part in zip(client, forward, strict=True)]),
        everything_ms=middle([whole - part for whole, part in zip(client, alone_s, strict=True)]),
    )


@dataclass(frozen=True)
class Comparison:
    """The service and the engine alone, with the same requests and the same bound of a batch."""

    server: Server
    engine: EngineAlone
    asks: Sequence[Ask]
    groups: Sequence[ScoringGroup]
    max_tokens: int
    cores: Cores

    async def singles(self, count: int) -> Overhead:
        """Send requests one by one, each followed by its forward alone: what drifts, drifts for both.

        Raises:
            ServerError: one was not scored.
        """
        records, alone_s = [], []
        async with Sender(self.server.url, pools=1) as send:
            await ClosedLoop(send, self.asks).run(MAX_SECONDS, WARM_UP)
            for number in range(count):
                place = number % len(self.asks)
                records += await ClosedLoop(send, [self.asks[place]]).run(MAX_SECONDS, 1)
                with pinned(self.cores.server):  # the engine alone gets what the service gets
                    alone_s.append(self.engine.forward_s(self.groups[place], self.max_tokens))
        return overhead(_all_scored(records), alone_s)

    async def throughput(self, rounds: int, seconds: float) -> Throughput:
        """Measure both in turn."""
        alone, http = [], []
        for _ in range(rounds):
            with pinned(self.cores.server):
                alone.append(self.engine.candidates_a_second(self.groups, seconds, CALLERS, self.max_tokens))
            async with Sender(self.server.url) as send:
                http.append(candidates_a_second(await ClosedLoop(send, self.asks, CALLERS).run(seconds)))
        return Throughput(alone, http)


def candidates_a_second(records: Sequence[Record]) -> float:
    """Return the rate between the first answer and the last: neither the start nor the end, when callers are missing.

    Raises:
        ServerError: one was not scored, or there are too few to tell.
    """
    done = sorted(_all_scored(records), key=lambda record: record.done)
    until = max(record.scheduled for record in done)  # the last request sent: from here on callers drop out
    counted = [record for record in done if record.done <= until]
    if len(counted) < 2:
        raise ServerError(f"{len(done)} requests are too few for a rate; give more --seconds")
    return sum(record.candidates for record in counted[1:]) / (counted[-1].done - counted[0].done)


def _all_scored(records: Sequence[Record]) -> Sequence[Record]:
    others = [record.answer.status for record in records if not record.ok]
    if others:
        raise ServerError(f"{len(others)} of {len(records)} requests were not scored; the first has {others[0]}")
    return records


def main(
    bundle: BundleOption,
    candidates: Annotated[int, typer.Option(min=1, max=1000, help="Candidates of a request.")] = 100,
    requests: Annotated[int, typer.Option(min=10, max=100_000, help="Single requests to measure.")] = 200,
    seconds: Annotated[float, typer.Option(min=1, max=MAX_SECONDS, help="Length of a round of throughput.")] = 10.0,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Rounds of throughput, engine and HTTP in turn.")] = 3,
    threads: ThreadsOption = None,
    server_cores: ServerCoresOption = "",
    generator_cores: GeneratorCoresOption = "",
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """Measure everything but the forward, and HTTP's share of the engine's own throughput."""
    with one_line_errors("overhead"):
        manifest = read_manifest(bundle)
        cores = cores_of(server_cores, generator_cores)
        catalogue = Catalogue.read(bundle)
        known = min(candidates, len(catalogue.item_ids))
        workload = Workload(catalogue, Mix(unknown_share=0), seed)
        asks = [workload.ranking(number, known) for number in range(REQUESTS)]
        with pinned(cores.server):
            engine = EngineAlone(bundle, threads)
        groups = [engine.group(ask) for ask in asks]
        max_tokens = load_settings(bundle=bundle).batch_tokens
        with serve_with(bundle, threads, cores) as server:
            compared = Comparison(server, engine, asks, groups, max_tokens, cores)
            around = asyncio.run(compared.singles(requests))
            seen = asyncio.run(compared.throughput(rounds, seconds))
        _report(around, seen, known, out=out, bundle_id=manifest.bundle_id)


def _report(around: Overhead, seen: Throughput, candidates: int, **where: Any) -> None:
    told = [
        ("client, from sending to the last byte", around.client_ms),
        ("forward as the service times it, worker's pipe counted in", around.forward_ms),
        ("forward alone, in this process", around.alone_ms),
        ("service: total less forward", around.service_ms),
        ("HTTP, JSON and the client: client less total", around.http_ms),
        ("everything but the service's forward leg: client less forward", around.around_ms),
        ("everything but the forward: client less forward alone", around.everything_ms),
    ]
    show(f"p50 of {around.requests} single /rank of {candidates}", [{"what": one, "ms": ms} for one, ms in told])
    rows = [
        {"round": number, "engine alone /s": alone, "HTTP /s": http, "share": f"{http / alone:.1%}"}
        for number, (alone, http) in enumerate(zip(seen.alone, seen.http, strict=True), 1)
    ]
    show(f"candidates a second, {CALLERS} callers; median share {seen.ratio:.1%}", rows)
    result = {"candidates": candidates, "p50": asdict(around), "throughput": {**asdict(seen), "ratio": seen.ratio}}
    write(where["out"], "overhead", where["bundle_id"], result)


if __name__ == "__main__":
    typer.run(main)
