"""The real service as a process on a free loopback port, started for a measurement and stopped after it."""

import ipaddress
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import httpx

from loadtests.scrape import Scrape

PROGRAM = (sys.executable, "-m", "service.cli")  # sella-serve
READY_S = 180.0
STOP_S = 60.0


class ServerError(RuntimeError):
    """The service could not be used for a measurement; the message says why."""


@dataclass(frozen=True)
class Cores:
    """Which CPU cores the service and the generator may use; empty leaves them alone."""

    server: tuple[int, ...] = ()
    generator: tuple[int, ...] = ()


class Server:
    """A started service."""

    def __init__(self, url: str, process: "subprocess.Popen[str]", log: Path) -> None:
        self.url = url
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        """The server's process; the worker is its child."""
        return self._process.pid

    def scrape(self) -> Scrape:
        """Read /metrics."""
        return Scrape.parse(httpx.get(f"{self.url}/metrics", timeout=30, trust_env=False).raise_for_status().text)

    def settle(self, seconds: float = 60.0) -> float:
        """Wait until nothing waits in the queue; return the gauge's last value, which is not 0 if it never emptied."""
        end = time.monotonic() + seconds
        while (tokens := self.scrape().value("sella_queue_tokens")) and time.monotonic() < end:
            time.sleep(0.1)
        return tokens

    def wait_until_ready(self) -> None:
        """Wait for /readyz.

        Raises:
            ServerError: the service stopped, or is not ready in time.
        """
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise ServerError(f"the service stopped with status {self._process.returncode}:\n{self.last_words()}")
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5, trust_env=False).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise ServerError(f"the service was not ready within {READY_S:g} s:\n{self.last_words()}")

    def last_words(self) -> str:
        """Return the end of the service's log."""
        return "\n".join(self._log.read_text().splitlines()[-5:])

    def stop(self) -> None:
        """Stop it as a service manager would; kill it if it does not end."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def serve(
    bundle: Path,
    *,
    cores: Cores | None = None,
    settings: Mapping[str, str] | None = None,
    program: Sequence[str] = PROGRAM,
) -> Iterator[Server]:
    """Run `sella-serve run` for a bundle until the block ends. `settings` are SELLA_ variables.

    Raises:
        ServerError: it does not start.
    """
    cores = cores or Cores()
    command = [*program, "run", "--bundle", str(bundle), "--port", "0"]
    with tempfile.TemporaryDirectory(prefix="sella-load-") as folder, pinned(cores.generator):
        # A log of its own: what a measurement reports is nobody's history.
        own = {"SELLA_HOST": "127.0.0.1", "SELLA_INTERACTIONS": str(Path(folder) / "interactions.sqlite")}
        environment = {**os.environ, **own, **(settings or {})}
        log = Path(folder) / "service.log"
        # To a file: a pipe that nobody empties would stop the service once it is full.
        with log.open("w") as errors, _started(command, environment, errors, cores.server) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            found = re.search(r"on (http://127\.0\.0\.1:\d+) ", first)
            if found is None:
                process.wait(STOP_S)
                raise ServerError(log.read_text().strip() or f"sella-serve: no address in its first line: {first!r}")
            server = Server(found[1], process, log)
            try:
                server.wait_until_ready()
                yield server
            finally:
                server.stop()


def _started(
    command: Sequence[str], environment: Mapping[str, str], errors: IO[str], cores: Sequence[int]
) -> "subprocess.Popen[str]":
    with pinned(cores):  # a child inherits its parent's cores, and so does every thread that it starts
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)


@contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """Keep this thread, and what it starts, to some CPU cores while the block runs; none leaves it alone.

    Raises:
        ServerError: the system has no such cores, or cannot pin.
    """
    if not cores:
        yield
        return
    if not hasattr(os, "sched_setaffinity"):
        raise ServerError("this system cannot pin processes to cores; leave the cores out")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        raise ServerError(f"cores {sorted(cores)}: this process may use {sorted(before)}") from error
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def require_loopback(url: str) -> str:
    """Return the URL if it is of this machine.

    Raises:
        ServerError: load would go to another machine.
    """
    host = urlsplit(url).hostname or ""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise ServerError(f"{url}: load goes to this machine alone; give a loopback address such as 127.0.0.1")
    return url
