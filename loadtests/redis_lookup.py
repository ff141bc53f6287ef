"""`python -m loadtests.redis_lookup`: what items take in a Redis of its own, and how long a look-up takes.

(a) many items with small vectors: memory an item, time of a look-up. (b) fewer at Qwen2-7B's sizes, the in-process
cache off: the same, and from both what millions of items take. Look-ups come one after another, each of a user with a
history and candidates drawn anew, through the very code that the service runs.
"""

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import typer
import uvloop

from loadtests.options import OutOption, SeedOption
from loadtests.records import quantile_ms
from loadtests.redis_filled import BUNDLE_ID, USERS, Filled, Sizes, fill, local_redis
from loadtests.report import one_line_errors, show, write
from service.features.cache import ItemCache
from service.features.client import open_client
from service.features.codec import Codec, Precision
from service.features.protocol import Query
from service.features.redis import RedisStore
from service.metrics.registry import Metrics

QWEN2_7B = (256, 3584)  # d_C, d_L
WARM_UP = 50
TIMEOUT_S = 10.0
MACHINES_GIB = (256, 1024)
USED = 0.8  # of a machine's memory that Redis may fill: buffers, fragmentation, and a fork that saves

Times = tuple[list[float], list[float]]  # seconds by the clock, seconds of this thread
Run = Callable[[Coroutine[Any, Any, Times]], Times]
LOOPS: dict[str, Run] = {"asyncio": asyncio.run, "uvloop": uvloop.run}


@dataclass(frozen=True)
class LookUps:
    """Times of look-ups in one setting, milliseconds. `cpu` is this process's own work: what waiting cannot blur."""

    items: int
    precision: str
    loop: str
    candidates: int
    p50_ms: float | None
    p99_ms: float | None
    worst_ms: float | None
    cpu_p50_ms: float | None
    cpu_p99_ms: float | None


@dataclass(frozen=True)
class Memory:
    """What items take in Redis, and how many fit."""

    items: int
    precision: str
    d_collab: int
    d_model: int
    record_bytes: int
    bytes_an_item: int
    ten_million_gib: float
    fit_in_256_gib_millions: float
    fit_in_1024_gib_millions: float


def memory(sizes: Sizes, precision: Precision, filled: Filled) -> Memory:
    """Return what was measured, and what follows for ten million items and for whole machines."""
    each = filled.memory_bytes / sizes.items
    small, large = (round(USED * gib * 2**30 / each / 1e6, 1) for gib in MACHINES_GIB)
    return Memory(
        *(sizes.items, precision.name.lower(), sizes.d_collab, sizes.d_model, filled.record_bytes, round(each)),
        *(round(1e7 * each / 2**30, 1), small, large),
    )


async def _times(url: str, sizes: Sizes, candidates: int, count: int, seed: int) -> Times:
    """Return the seconds of look-ups with nothing cached."""
    rng = np.random.default_rng(seed)
    client = open_client(url, TIMEOUT_S)
    codec = Codec(sizes.d_collab, sizes.d_model)
    store = RedisStore(client, BUNDLE_ID, codec, ItemCache(0, Metrics().store))
    times: list[float] = []
    worked: list[float] = []
    for number in range(WARM_UP + count):
        user = frozenset({f"u{rng.integers(USERS)}"})
        query = Query(user, frozenset(map(str, rng.choice(sizes.items, candidates, replace=False))), user)
        started, before = time.perf_counter(), time.thread_time()
        found = await store.look_up(BUNDLE_ID, query)
        taken, work = time.perf_counter() - started, time.thread_time() - before
        assert len(found.items) == candidates and len(found.users) == 1
        if number >= WARM_UP:
            times.append(taken)
            worked.append(work)
    await client.aclose()
    return times, worked


def measure(
    url: str, sizes: Sizes, precision: Precision, candidates: Sequence[int], count: int, seed: int
) -> list[LookUps]:
    """Time look-ups on both event loops."""
    measured = []
    for loop, run in LOOPS.items():
        for each in candidates:
            times, worked = run(_times(url, sizes, each, count, seed))
            quantiles = [quantile_ms(times, share) for share in (0.5, 0.99, 1.0)]
            quantiles += [quantile_ms(worked, share) for share in (0.5, 0.99)]
            measured.append(LookUps(sizes.items, precision.name.lower(), loop, each, *quantiles))
    return measured


def main(
    items: Annotated[int, typer.Option(min=1000, help="Items with small vectors.")] = 1_000_000,
    small: Annotated[tuple[int, int], typer.Option(help="d_C and d_L of the small vectors.")] = (64, 64),
    large_items: Annotated[int, typer.Option(min=1000, help="Items at Qwen2-7B's sizes.")] = 20_000,
    lookups: Annotated[int, typer.Option(min=100, help="Look-ups of each setting.")] = 2000,
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """Fill a local Redis with made-up items and look them up."""
    took: list[Memory] = []
    found: list[LookUps] = []
    with one_line_errors("redis_lookup"), local_redis() as url:
        for sizes in (Sizes(items, *small), Sizes(large_items, *QWEN2_7B)):
            for precision in Precision:
                took.append(memory(sizes, precision, fill(url, sizes, precision, seed)))
                found += measure(url, sizes, precision, (100,), lookups, seed)
                found += measure(url, sizes, precision, (1000,), lookups // 10, seed)
    measured = ("items", "precision", "d_model", "record_bytes", "bytes_an_item", "ten_million_gib")
    show("memory of an item", [{name: asdict(one)[name] for name in measured} for one in took])
    fits = ("precision", "d_model", "fit_in_256_gib_millions", "fit_in_1024_gib_millions")
    show("what fits if Redis takes 80 % of a machine", [{name: asdict(one)[name] for name in fits} for one in took])
    show("one look-up: a user, ten likes, candidates; nothing cached", [asdict(one) for one in found])
    busy = os.getloadavg()[0]  # of the last minute: what else the machine did
    result = {"load_average": busy, "memory": [asdict(one) for one in took], "lookups": [asdict(one) for one in found]}
    write(out, "redis_lookup", BUNDLE_ID, result)


if __name__ == "__main__":
    typer.run(main)
