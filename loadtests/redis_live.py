"""`python -m loadtests.redis_live`: what an impression, a like and a deletion take in a Redis of its own.

Events go through the scripts that the service runs, with ids of usual lengths, and one bundle's table of counts.
"""

import asyncio
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from redis.asyncio import Redis

from loadtests.options import OutOption
from loadtests.redis_filled import BUNDLE_ID, local_redis
from loadtests.report import one_line_errors, show, write
from service.features.client import open_client
from service.features.keys import Keys
from service.interactions.event import EntryKind, Interaction, LogEntry
from service.interactions.redis import RedisInteractions

TIMEOUT_S = 60.0
NOW = 1_750_000_000.0
_BATCH = 500
KEYS = Keys()


@dataclass(frozen=True)
class Taken:
    """Bytes of Redis's memory for each of many alike; `ends` says when they are free again.

    A known impression's state is apart from its outcome, of which a user has 50 here, and from the counts of an item
    that nobody else was shown. A like is a user's first, with its impression, its outcome and the user's counts.
    """

    of: str
    bytes_each: int
    ends: str


def _event(number: int, users: int, label: bool | None) -> Interaction:
    request = f"7d0c1b52-4f0e-4e0a-9a53-{number // 20:012d}"
    return Interaction(
        f"{request}-{number % 20}", f"user-{number % users:07d}", f"item-{number:07d}", label, NOW + number, request, 1
    )


async def _apply(
    client: Redis, name: str, count: int, users: int, label: bool | None, kind: EntryKind = "event", begin: int = 0
) -> int:
    """Apply entries and return the bytes that Redis's memory has grown by."""
    shared = RedisInteractions(client, 90 * 86_400, 4500)
    before = int((await client.info("memory"))["used_memory"])
    for first in range(0, count, _BATCH):
        numbers = range(first, min(first + _BATCH, count))
        entries = [LogEntry(one + 1, kind, _event(begin + one, users, label)) for one in numbers]
        await shared.apply(name, entries)
    return int((await client.info("memory"))["used_memory"]) - before


async def measure(url: str, count: int) -> list[Taken]:
    """Return what was measured."""
    client = open_client(url, TIMEOUT_S)
    keys = KEYS.bundle(BUNDLE_ID)
    await client.hset(keys.meta, mapping={"counts": 1, "counted_until": 0})
    await client.sadd(KEYS.bundles, BUNDLE_ID)
    users = max(1, count // 50)
    window, retention = "window + 15 min", "retention"
    waiting = await _apply(client, "shown", count, users, None)
    known = await _apply(client, "known", count, users, False)
    after = int((await client.info("memory"))["used_memory"])
    await client.delete(*[key async for key in client.scan_iter(f"{KEYS.impression}*", _BATCH)])
    state = after - int((await client.info("memory"))["used_memory"])
    liked = await _apply(client, "liked", count, count, True)
    gone = await _apply(client, "gone", count, 10 * count, None, "deletion", count)
    await client.aclose()
    return [
        Taken("impression, waiting", round(waiting / count), window),
        Taken("impression, known", round(state / count), window),
        Taken("outcome, item's counts", round((waiting + known - state) / count), retention),
        Taken("user's first like", round(liked / count), retention),
        Taken("deletion", round(gone / count), "never"),
    ]


def main(
    count: Annotated[int, typer.Option(min=1000, help="Events of each kind.")] = 100_000, out: OutOption = None
) -> None:
    """Fill a local Redis with made-up interactions."""
    with one_line_errors("redis_live"), local_redis() as url:
        took = asyncio.run(measure(url, count))
    show("memory of what is live", [asdict(one) for one in took])
    write(out, "redis_live", BUNDLE_ID, {"count": count, "memory": [asdict(one) for one in took]})


if __name__ == "__main__":
    typer.run(main)
