"""The real service as a process for tests: started, watched, ended in any way."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]


class Server:
    """A started server and what it has said."""

    def __init__(self, bundle: Path, *, port: int = 0, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "run", "--bundle", str(bundle), "--port", str(port)],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONWARNINGS": "error,always:resource_tracker",
                "SELLA_ENGINE_THREADS": "1",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        self.first_line = self.process.stdout.readline()
        self.log: list[str] = []
        self._drain = threading.Thread(target=self.log.extend, args=(self.process.stderr,))
        self._drain.start()
        found = re.search(r"on (http://127\.0\.0\.1:\d+) ", self.first_line)
        self.url = found[1] if found else ""

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)

    def end(self, stop: signal.Signals) -> int:
        self.process.send_signal(stop)
        return self.wait()

    def wait(self) -> int:
        """Wait for the end, and for the last word of whatever it left behind."""
        status = self.process.wait(60)
        self._drain.join(10)
        return status

    def wait_until_loaded(self, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not any('"engine_ready"' in line for line in self.log):
            assert self.process.poll() is None and time.monotonic() < end, (self.process.poll(), self.log)
            time.sleep(0.02)

    def worker_pid(self) -> int:
        [line] = [json.loads(line) for line in self.log if '"engine_ready"' in line][-1:]
        return int(line["worker_pid"])

    def clean_up(self) -> None:
        self.process.kill()
        self.process.wait()
        self._drain.join(10)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
