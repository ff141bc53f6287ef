"""A thousand slow clients, and a process that may open no more files, while others want answers."""

import resource
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from models.loading import Bundle
from tests.faults.load import asks_of, load_on
from tests.faults.slow import MANNERS, slow_clients
from tests.serving import Server, wait_for

pytestmark = pytest.mark.timeout(180)

SLOW = 1000
SHORT = {f"SELLA_{name}_TIMEOUT_S": "3" for name in ("HEAD", "BODY", "WRITE")}


@pytest.fixture
def server(bundle: Bundle) -> Iterator[Server]:
    server = Server(bundle.folder, **SHORT)
    server.wait_until_loaded()
    yield server
    server.clean_up()


def metric(server: Server, name: str) -> float:
    with server.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def port_of(server: Server) -> int:
    return urlsplit(server.url).port or 0


def test_a_thousand_slow_clients_do_not_keep_others_waiting(server: Server) -> None:
    asks = asks_of(server.url, ["u0", "u1", "u2"], ["i1", "i2", "i3"])
    process = psutil.Process(server.process.pid)
    with slow_clients(port_of(server), SLOW) as cut_off:
        wait_for(lambda: metric(server, "sella_connections ") > SLOW * 0.8)
        before = process.memory_info().rss
        with load_on(server.url, asks) as load:
            time.sleep(12)
        grown = process.memory_info().rss - before
        assert set(cut_off) == set(MANNERS)
    assert not load.wrong
    assert load.good >= 20 and load.share_good >= 0.99, load.statuses()
    assert grown < 100e6
    for reason in ("head_timeout", "write_timeout"):
        assert metric(server, f'sella_connections_cut_off_total{{reason="{reason}"}}') > 50
    assert metric(server, 'sella_requests_total{outcome="error"') == 0
    wait_for(lambda: metric(server, "sella_connections ") < 10)


def test_a_process_without_another_file_goes_on_and_recovers(server: Server) -> None:
    asks = asks_of(server.url, ["u0", "u1"], ["i1", "i2", "i3"])
    pid = server.process.pid
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (files + 30, hard))
    with slow_clients(port_of(server), 200):
        time.sleep(8)
        assert server.process.poll() is None
    with server.client() as client:
        assert client.get("/livez").status_code == 200
    with load_on(server.url, asks) as load:
        time.sleep(3)
    assert load.share_good == 1 and not load.wrong, load.statuses()


def test_at_the_cap_slow_clients_give_way_to_those_who_ask(bundle: Bundle) -> None:
    server = Server(bundle.folder, SELLA_MAX_CONNECTIONS="100")
    try:
        server.wait_until_loaded()
        asks = asks_of(server.url, ["u0", "u1"], ["i1", "i2", "i3"])
        with slow_clients(port_of(server), 300), load_on(server.url, asks) as load:
            time.sleep(8)
        assert load.good >= 10 and load.share_good >= 0.99 and not load.wrong, load.statuses()
        assert metric(server, 'sella_connections_cut_off_total{reason="crowded_out"}') > 50
    finally:
        server.clean_up()
