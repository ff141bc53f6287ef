"""A Redis of its own with made-up users and items in it, as `sella-serve publish` writes them.

Shapes: C = d_C, D = d_L, V all of an item's numbers.
"""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import redis
from rich.progress import track

from loadtests.report import CONSOLE
from models.features import ItemFeatures, UserFeatures
from service.features.codec import Codec, Precision
from service.features.keys import BundleKeys

BUNDLE_ID = "5e11a" + 59 * "0"
HISTORY = 10  # likes of every user, the prompt's window
USERS = 1000
_TITLE = "A made-up title of a usual length (1999)"
_BATCH = 1000
_TIMEOUT_S = 60.0  # emptying a Redis of a million items takes seconds
_DRAWN = 1024  # different vectors; Redis does not compress, so more would show nothing more


@dataclass(frozen=True)
class Sizes:
    """How many items, and the dimensions of their vectors."""

    items: int
    d_collab: int
    d_model: int


@contextmanager
def local_redis() -> Iterator[str]:
    """Run a Redis on a Unix socket until the block ends; yield its address. It writes nothing to disk.

    Raises:
        OSError: there is no redis-server, or it does not start.
    """
    binary = shutil.which("redis-server")
    if binary is None:
        raise OSError("redis-server: not found; install Redis (Debian: apt install redis-server)")
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        socket = Path(folder) / "s"
        command = [binary, "--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            _wait(f"unix://{socket}")
            yield f"unix://{socket}"
        finally:
            process.kill()
            process.wait()


def _wait(url: str) -> None:
    for _ in range(200):
        with suppress(redis.ConnectionError), redis.Redis.from_url(url) as client:
            client.ping()
            return
        time.sleep(0.05)
    raise OSError("redis-server does not answer")


@dataclass(frozen=True)
class Filled:
    """What was written and what it took."""

    record_bytes: int
    memory_bytes: int  # of all items in Redis, keys and all
    seconds: float


def fill(url: str, sizes: Sizes, precision: Precision, seed: int) -> Filled:
    """Empty a Redis and write items and users; memory is of the items alone."""
    codec, keys, rng = Codec(sizes.d_collab, sizes.d_model), BundleKeys(BUNDLE_ID), np.random.default_rng(seed)
    drawn_V = rng.normal(size=(_DRAWN, 2 * sizes.d_collab + sizes.d_model)).astype(np.float32)
    with redis.Redis.from_url(url, socket_timeout=_TIMEOUT_S) as client:
        client.flushall()
        before = int(client.info("memory")["used_memory"])
        started = time.monotonic()
        record = b""
        for first in track(
            range(0, sizes.items, _BATCH), f"{sizes.items} items, {precision.name.lower()}", console=CONSOLE
        ):
            with client.pipeline(transaction=False) as pipe:
                for row in range(first, min(first + _BATCH, sizes.items)):
                    record = codec.encode_item(_item(row, drawn_V[row % _DRAWN], sizes.d_collab), precision)
                    pipe.set(f"{keys.items}{row}", record)
                pipe.execute()
        seconds = time.monotonic() - started
        memory = int(client.info("memory")["used_memory"]) - before
        for row in range(USERS):
            history = tuple(str(one) for one in rng.integers(0, sizes.items, HISTORY))
            user = UserFeatures(
                f"u{row}", drawn_V[row % _DRAWN, : sizes.d_collab], history, (1.0e9,) * HISTORY, HISTORY
            )
            client.set(f"{keys.users}u{row}", codec.encode_user(user, precision))
        client.hset(keys.meta, mapping={"bundle_id": BUNDLE_ID, "complete": "1"})
    return Filled(len(record), memory, seconds)


def _item(row: int, numbers_V: np.ndarray[tuple[int, ...], np.dtype[np.float32]], d_collab: int) -> ItemFeatures:
    return ItemFeatures(
        str(row),
        _TITLE,
        numbers_V[:d_collab],
        numbers_V[d_collab : 2 * d_collab],
        numbers_V[2 * d_collab :],
        trained=True,
    )
