"""Interactions while the service is killed, its disk is full or its log is held by another."""

import os
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.loading import Bundle
from service.interactions.backup import check
from service.interactions.database import open_to_read
from service.interactions.ledger import Ledger
from tests.serving import ROOT, Server, wait_for

Start = Callable[..., Server]


@pytest.fixture
def start(bundle: Bundle, tmp_path: Path) -> Iterator[Start]:
    """Starts servers on one log, and ends them all."""
    servers = []

    def begin() -> Server:
        server = Server(bundle.folder, SELLA_INTERACTIONS=str(tmp_path / "log.sqlite"))
        servers.append(server)
        return server

    yield begin
    for server in servers:
        server.clean_up()


def told(event_id: str, user_id: str = "u1") -> dict[str, Any]:
    return {"event_id": event_id, "user_id": user_id, "item_id": "i7", "label": True, "timestamp": int(time.time())}


def post(client: httpx.Client, *events: dict[str, Any]) -> httpx.Response:
    return client.post("/interactions", json={"interactions": list(events)})


def wait_for_model(server: Server) -> None:
    wait_for(lambda: httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200, 200)


def ready(server: Server) -> bool:
    return bool(httpx.get(f"{server.url}/readyz", timeout=60).json()["interactions"]["ready"])


def test_no_acknowledged_interaction_is_lost_or_doubled_by_kill_9(start: Start, tmp_path: Path) -> None:
    server = start()
    sent: list[list[dict[str, Any]]] = []
    acknowledged: list[dict[str, Any]] = []

    def send(number: int) -> None:
        with server.client() as client:
            for count in range(10_000):
                batch = [told(f"{number}-{count}-{more}", f"user{number}") for more in range(3)]
                sent.append(batch)
                try:
                    assert post(client, *batch).status_code == 200
                except httpx.HTTPError:
                    return
                acknowledged.extend(batch)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(acknowledged) > 300)
    server.process.kill()
    for thread in threads:
        thread.join()
    again = start()
    with again.client() as client:
        for first in range(0, len(acknowledged), 500):
            some = acknowledged[first : first + 500]
            assert post(client, *some).json()["duplicates"] == len(some)
        everything = [one for batch in sent for one in batch]
        for first in range(0, len(everything), 500):
            assert post(client, *everything[first : first + 500]).status_code == 200
        wait_for_model(again)
        answer = client.post("/rank", json={"user_id": "user0", "candidates": ["i1"]}).json()
    assert answer["history"]["source"] == "live"
    connection = open_to_read(tmp_path / "log.sqlite")
    ledger = Ledger(connection, 60.0)
    assert ledger.entries() == len(everything)
    assert ledger.counts("item", ["i7"])["i7"] == (len(everything), len(everything))
    connection.close()


def test_a_full_disk_is_a_503_scores_go_on_and_it_recovers(start: Start, tmp_path: Path) -> None:
    server = start()
    wait_for_model(server)
    pid = server.process.pid
    acknowledged: list[str] = []
    with server.client() as client:
        assert post(client, told("first")).status_code == 200
        # The largest file that this process may write, from now on: what a full disk does to it, and to it alone.
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        room = (tmp_path / "log.sqlite-wal").stat().st_size + 50_000
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (room, before[1]))
        for count in range(1000):
            batch = [f"e{count}-{more}" for more in range(10)]
            response = post(client, *map(told, batch))
            if response.status_code != 200:
                break
            acknowledged += batch
        assert response.status_code == 503 and response.json()["error"]["code"] == "log_unavailable"
        assert "retry-after" in response.headers
        # What was written may have gone into the file meanwhile and left room; now there is none at all.
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (2000, before[1]))
        wait_for(lambda: post(client, told("no-room")).status_code == 503 and not ready(server), 30)
        assert client.post("/rank", json={"user_id": "u1", "candidates": ["i1"]}).json()["history"]["source"] == "live"
        state = client.get("/readyz")
        assert state.status_code == 200 and not state.json()["interactions"]["ready"]
        assert "sella_log_up 0.0" in client.get("/metrics").text
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        wait_for(lambda: ready(server), 30)  # by itself, without a request
        assert post(client, *(told(f"after{more}") for more in range(10))).json()["accepted"] == 10
        assert "sella_log_up 1.0" in client.get("/metrics").text
    assert server.end(signal.SIGTERM) == 0
    connection = open_to_read(tmp_path / "log.sqlite")
    found = [entry.interaction.event_id for entry in Ledger(connection, 60.0).read(0, 10_000)]
    connection.close()
    assert len(found) == len(set(found))
    assert {"first", *acknowledged, *(f"after{more}" for more in range(10))} <= set(found)
    assert not {f"e{count}-{more}" for more in range(10)} & set(found)  # of the batch that was refused, nothing


def test_a_second_server_scores_without_the_log_and_takes_it_over(start: Start) -> None:
    first, second = start(), start()
    assert ready(first) and not ready(second)
    e1, e2 = told("e1", "new"), told("e2", "new")
    with first.client() as one, second.client() as other:
        assert post(one, e1).status_code == 200
        assert post(other, e2).status_code == 503
        first.process.kill()
        wait_for(lambda: ready(second), 30)
        wait_for_model(second)
        assert post(other, e1, e2).status_code == 200
        history = other.post("/rank", json={"user_id": "new", "candidates": ["i1"]}).json()["history"]
    assert history["given"] == 2


def test_a_backup_beside_the_server_is_restored_after_its_death(start: Start, tmp_path: Path) -> None:
    log, copy = tmp_path / "log.sqlite", tmp_path / "copy.sqlite"

    def command(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "service.cli", *words, "--interactions", str(log)],
            cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    server = start()
    with server.client() as client:
        assert post(client, *(told(f"old{number}") for number in range(200))).status_code == 200
        done = command("backup", "--out", str(copy))
        assert done.returncode == 0 and "200 events" in done.stdout, done.stderr
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        assert post(client, *(told(f"new{number}") for number in range(200))).status_code == 200
        refused = command("restore", "--backup", str(copy))
        assert refused.returncode == 2 and "stop the server first" in refused.stderr
    server.process.kill()
    server.process.wait()
    assert log.with_name("log.sqlite-wal").stat().st_size
    done = command("restore", "--backup", str(copy))
    assert done.returncode == 0, done.stderr
    again = start()
    with again.client() as client:
        assert post(client, *(told(f"new{number}") for number in range(200))).json()["accepted"] == 200
        assert check(log).events == 400


def test_a_standard_error_that_nobody_reads_stops_neither_scores_nor_the_end(bundle: Bundle, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "service.cli", "run", "--bundle", str(bundle.folder), "--port", "0"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=writer, text=True,
        env={**os.environ, "SELLA_INTERACTIONS": str(tmp_path / "log.sqlite"), "SELLA_ENGINE_THREADS": "1"},
    )  # fmt: skip
    try:
        os.set_blocking(writer, True)
        assert process.stdout is not None
        found = re.search(r"http://[\d.:]+", process.stdout.readline())
        assert found is not None
        with httpx.Client(base_url=found[0], timeout=60) as client:
            wait_for(lambda: client.get("/readyz").status_code == 200, 200)
            for _ in range(600):  # each a line of two hundred bytes and more; the pipe holds 64 kB
                assert client.post("/rank", json={"user_id": "u1", "candidates": ["i1"]}).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        os.close(reader)
        os.close(writer)
