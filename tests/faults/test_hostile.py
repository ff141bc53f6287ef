"""Ten million random bytes at the port: no crash, no growth, no log full of them."""

import random
import socket
from contextlib import closing, suppress
from urllib.parse import urlsplit

import psutil
import pytest

from models.loading import Bundle
from tests.serving import Server

pytestmark = pytest.mark.timeout(200)

BYTES = 10_000_000
STARTS = (
    b"",
    b"POST /rank HTTP/1.1\r\n",
    b"POST /rank HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
)


def test_ten_million_random_bytes_do_no_harm(bundle: Bundle) -> None:
    chance = random.Random(7)
    server = Server(bundle.folder)
    try:
        server.wait_until_loaded()
        address = ("127.0.0.1", urlsplit(server.url).port or 0)
        process = psutil.Process(server.process.pid)
        before, files = process.memory_info().rss, process.num_fds()
        sent = 0
        while sent < BYTES:
            noise = chance.randbytes(chance.choice((1, 10, 1000, 20_000, 200_000)))
            start = chance.choice(STARTS)
            with closing(socket.create_connection(address, timeout=20)) as client, suppress(OSError):
                client.sendall(start + noise)
                client.shutdown(socket.SHUT_WR)
                while client.recv(65536):
                    pass
            sent += len(noise)
        with server.client() as client:
            assert client.post("/rank", json={"user_id": "u0", "candidates": ["i1"]}).status_code == 200
            metrics = client.get("/metrics").text
        assert server.process.poll() is None
        assert process.memory_info().rss - before < 50e6
        assert process.num_fds() < files + 20
        assert 'outcome="error"' not in metrics.replace('outcome="error"} 0.0', "")
        assert not any("Traceback" in line or "internal_error" in line for line in server.log)
        assert len(server.log) < 100  # clients cannot fill the log
    finally:
        server.clean_up()
