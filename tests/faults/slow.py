"""Clients that take their time: each holds a connection, does as little as it can, and comes back when cut off."""

import asyncio
import resource
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PAUSE_S = 0.5
HEAD = b"POST /rank HTTP/1.1\r\nHost: sella\r\nContent-Type: application/json\r\n"
GET = b"GET /openapi.json HTTP/1.1\r\nHost: sella\r\n\r\n"
# How a connection begins, and what it then sends now and then. The last asks for much and reads nothing.
MANNERS = {
    "silent": (b"", b""),
    "slow head": (b"GET /", b"a"),
    "slow body": (HEAD + b"Content-Length: 100000\r\n\r\n", b" "),
    "slow chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "deaf": (GET * 20, GET),
}


@contextmanager
def slow_clients(port: int, count: int) -> Iterator[Counter[str]]:
    """Keep `count` slow clients at a port of this machine while the block runs; yields how often each was cut off."""
    cut_off: Counter[str] = Counter()
    allow_files(count + 200)
    loop = asyncio.new_event_loop()

    async def be_slow() -> None:
        manners = list(MANNERS)
        await asyncio.gather(*(_one(port, manners[number % len(manners)], cut_off) for number in range(count)))

    tasks = asyncio.ensure_future(be_slow(), loop=loop)

    def run() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(tasks)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield cut_off
    finally:
        loop.call_soon_threadsafe(tasks.cancel)
        thread.join()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def allow_files(count: int) -> None:
    """Let this process open as many files as its slow clients are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))


async def _one(port: int, manner: str, cut_off: Counter[str]) -> None:
    loop = asyncio.get_running_loop()
    start, drop = MANNERS[manner]
    while True:
        with socket.socket() as client:
            client.setblocking(False)
            if manner == "deaf":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            with suppress(OSError):
                await loop.sock_connect(client, ("127.0.0.1", port))
                await _send(client, start)
                while not _ended(client, reads=manner != "deaf"):
                    await asyncio.sleep(PAUSE_S)
                    await _send(client, drop)
            cut_off[manner] += 1
        await asyncio.sleep(PAUSE_S)


async def _send(client: socket.socket, data: bytes) -> None:
    with suppress(BlockingIOError):  # a deaf client's requests stay in its own buffer
        client.send(data)


def _ended(client: socket.socket, *, reads: bool) -> bool:
    if not reads:
        return False  # its end is an error when it sends
    try:
        return client.recv(4096) == b""
    except BlockingIOError:
        return False
