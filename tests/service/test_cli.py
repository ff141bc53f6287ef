"""`python -m service.cli run` as a process: real HTTP, real signals, real deaths."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from models.loading import Bundle
from service.cli import CUT_OFF, _listen
from tests.service.test_supervised import alive
from tests.serving import ROOT, Server, wait_for

BODY = {"user_id": "u0", "candidates": ["i1", {"item_id": "new", "title": "Brand new"}, "i39"]}


@pytest.fixture
def server(bundle: Bundle) -> Iterator[Server]:
    server = Server(bundle.folder)
    yield server
    server.clean_up()


def test_a_server_lives_loses_its_worker_recovers_and_ends_with_0(server: Server) -> None:
    with server.client() as client:
        # It listens at once; the model is not there yet.
        assert client.get("/livez").status_code == 200
        assert client.get("/readyz").status_code == 503
        early = client.post("/rank", json=BODY)
        assert (early.status_code, early.json()["error"]["code"]) == (503, "not_ready")
        assert early.headers["retry-after"]
        wait_for(lambda: client.get("/readyz").status_code == 200)
        before = client.post("/rank", json=BODY).json()["results"]
        assert len(before) == 3

        os.kill(server.worker_pid(), signal.SIGKILL)
        wait_for(lambda: client.post("/rank", json=BODY).status_code == 503, 5)
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["engine"]["state"]) == (503, "restarting")
        wait_for(lambda: client.get("/readyz").json()["engine"]["restarts"] == 1, 5)
        wait_for(lambda: client.get("/readyz").status_code == 200)
        after = client.post("/rank", json=BODY).json()["results"]
        assert [one["item_id"] for one in after] == [one["item_id"] for one in before]
        assert after[0]["raw_score"] == pytest.approx(before[0]["raw_score"], abs=1e-6)
        text = client.get("/metrics").text
        assert "sella_engine_restarts_total 1.0" in text
        assert "sella_queue_tokens 0.0" in text

        # A body that is longer than allowed is refused on a real connection too.
        long = client.post("/rank", content=b" " * 1_100_000, headers={"content-type": "application/json"})
        assert long.status_code == 413

    # A request that runs when SIGTERM comes is answered; then the process ends with 0 and leaves no worker.
    worker = server.worker_pid()
    os.kill(worker, signal.SIGSTOP)
    answers: list[int] = []

    def ask() -> None:
        with server.client() as client:
            answers.append(client.post("/rank", json=BODY).status_code)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    os.kill(worker, signal.SIGCONT)
    asking.join(30)
    assert server.wait() == 0
    assert answers == [200]
    wait_for(lambda: not alive(worker), 5)
    events = [json.loads(line)["event"] for line in server.log]
    assert events[0] == "starting" and "engine_lost" in events and events.count("engine_ready") == 2


def test_an_offer_to_upgrade_is_ignored(server: Server) -> None:
    websocket = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA=="}
    http2 = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAMAAABkAAQAAP__"}
    for offer in (websocket, http2):
        with server.client() as client:
            answer = client.post("/rank", json={}, headers=offer)
            assert (answer.status_code, answer.json()["error"]["field"]) == (422, "user_id")
    assert server.end(signal.SIGTERM) == 0


def test_what_outlasts_the_drain_is_told_so(bundle: Bundle) -> None:
    server = Server(bundle.folder, SELLA_DRAIN_S="1")
    try:
        server.wait_until_loaded()
        os.kill(server.worker_pid(), signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool, server.client() as client:
            asked = pool.submit(client.post, "/rank", json=BODY)
            time.sleep(0.3)
            assert server.end(signal.SIGTERM) == 0
            answer = asked.result(10)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopping")
        assert answer.headers["x-request-id"] and answer.headers["retry-after"]
        assert [json.loads(line)["event"] for line in server.log[-2:]] == ["refused", "stopped"]
    finally:
        server.clean_up()


def test_a_killed_server_leaves_no_worker(server: Server) -> None:
    server.wait_until_loaded()
    worker = server.worker_pid()
    assert alive(worker)
    server.end(signal.SIGKILL)
    wait_for(lambda: not alive(worker), 5)


def test_a_corrupt_bundle_is_one_line_that_names_the_file(root: Path, bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    path = folder / "projection.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    command = [sys.executable, "-m", "service.cli", "run", "--bundle", str(folder), "--port", "0"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"sella-serve: {path}: altered since it was written (sha256 differs)\n"


def test_the_metrics_have_a_port_of_their_own(bundle: Bundle, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("shop:api-key-0123456789\n")
    keys.chmod(0o600)
    server = Server(bundle.folder, SELLA_METRICS_PORT="0", SELLA_API_KEYS_FILE=str(keys))
    try:
        metrics = re.search(r"metrics are on (http://127\.0\.0\.1:\d+)", server.first_line)
        assert metrics is not None, server.first_line
        server.wait_until_loaded()
        for path, closed in (("/metrics", 401), ("/docs", 401), ("/livez", 200), ("/readyz", 200), ("/rank", 401)):
            assert httpx.get(server.url + path).status_code == closed
            assert httpx.get(metrics[1] + path).status_code == (404 if path == "/rank" else 200)
        assert httpx.get(f"{server.url}/readyz").json() == {"ready": True}
        assert httpx.get(f"{metrics[1]}/readyz").json()["engine"]["state"] == "ready"
        assert "sella_ready 1.0" in httpx.get(f"{metrics[1]}/metrics").text
        assert server.end(signal.SIGTERM) == 0
    finally:
        server.clean_up()


def test_a_metrics_port_that_is_the_other_one_is_one_line(root: Path, bundle: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "service.cli", "run", "--bundle", str(bundle.folder), "--port", port]
    environment = {**os.environ, "SELLA_METRICS_PORT": port}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"sella-serve: cannot listen on 127.0.0.1:{port}")


def test_a_taken_port_is_one_line(bundle: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            _listen("127.0.0.1", port)


def test_a_process_that_cannot_end_is_ended(bundle: Bundle, tmp_path: Path) -> None:
    """A thread that waits for a disk for ever: here for a pipe, in the executor that Python joins at the end."""
    program = (
        "import concurrent.futures, os, sys, threading, uvicorn; from service import cli; from pathlib import Path;"
        "cli.END_S = 1.0;"
        "pool = concurrent.futures.ThreadPoolExecutor(); os.mkfifo(sys.argv[1]); pool.submit(open, sys.argv[1]);"
        "cli.run(Path(sys.argv[2]), None, 0, None, None)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "pipe"), str(bundle.folder)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "SELLA_DRAIN_S": "1", "SELLA_INTERACTIONS": str(tmp_path / "log.sqlite")},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        found = re.search(r"http://[\d.:]+", process.stdout.readline())
        assert found is not None and httpx.get(f"{found[0]}/livez", timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == CUT_OFF
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
