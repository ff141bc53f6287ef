"""The locustfile without a browser against a real service, in both loops, and refused for another machine."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from loadtests.server import Server
from models.loading import Bundle

# Not imported here: locust replaces the standard library's sockets on import.
pytestmark = pytest.mark.skipif(find_spec("locust") is None, reason="the extra `load` is not installed")


def locust(root: Path, bundle: Bundle, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--json"]
    whole = [*command, "--bundle", str(bundle.folder), "--users", "2", "--spawn-rate", "2", *options]
    return subprocess.run(whole, cwd=root, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("loop", ["closed", "open"])
def test_a_short_run_has_no_failures(server: Server, root: Path, bundle: Bundle, loop: str) -> None:
    done = locust(root, bundle, "--host", server.url, "--loop", loop, "--rate", "20", "--seconds", "1")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert sum(row["num_requests"] for row in rows) > 0
    assert sum(row["num_failures"] for row in rows) == 0
    assert {row["name"].split()[0] for row in rows} <= {"/rank", "/score"}


def test_a_bounded_open_loop_has_every_request_in_its_statistics(server: Server, root: Path, bundle: Bundle) -> None:
    done = locust(root, bundle, "--host", server.url, "--loop", "open", "--rate", "100", "--most", "12")
    assert done.returncode == 0, done.stderr
    assert sum(row["num_requests"] for row in json.loads(done.stdout)) == 12


def test_load_for_another_machine_is_refused(root: Path, bundle: Bundle) -> None:
    done = locust(root, bundle, "--host", "http://192.0.2.1")
    assert done.returncode == 1
    assert "load goes to this machine alone" in done.stderr
