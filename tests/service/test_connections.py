"""Slow, silent and garbled clients against a real port; the limits are short, the order of events is what is tested."""

import errno
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, cast

import httpx
import pytest
import structlog
import uvicorn

from models.loading import Bundle
from service.app import create_app
from service.collaborators import Collaborators
from service.connections import MAX_HEAD, MAX_HEADERS, Connections, room_for_connections
from service.headers import SECURITY_HEADERS
from tests.service.conftest import collaborators
from tests.service.echo import EchoEngine

MOST = 8
HEAD = b"POST /rank HTTP/1.1\r\nHost: sella\r\nContent-Type: application/json\r\n"


class Listening:
    """The application on a port, with connections of a few tenths of a second."""

    def __init__(self, service: Collaborators) -> None:
        self.service = service
        self.connections = Connections(service.settings, service.settings.max_connections, service.metrics.connections)
        http = cast(Any, self.connections.protocol)
        config = uvicorn.Config(create_app(service), port=0, log_config=None, http=http, timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port: int = self.server.servers[0].sockets[0].getsockname()[1]

    def connect(self, sent: bytes = b"") -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        client.sendall(sent)
        return client

    def cut_off(self, reason: str) -> float:
        labels = {"reason": reason}
        return self.service.metrics.registry.get_sample_value("sella_connections_cut_off_total", labels) or 0

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@contextmanager
def listening(bundle: Bundle, **settings: object) -> Iterator[Listening]:
    server = Listening(collaborators(bundle, EchoEngine(), **settings))
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(bundle: Bundle) -> Iterator[Listening]:
    short: dict[str, object] = dict.fromkeys(
        ("head_timeout_s", "body_timeout_s", "write_timeout_s", "keep_alive_s"), 0.3
    )
    with listening(bundle, max_connections=MOST, **short) as server:
        yield server


@pytest.fixture(autouse=True)
def all_gone(server: Listening) -> Iterator[None]:
    yield
    wait_for(lambda: len(server.connections) == 0)
    assert server.service.metrics.registry.get_sample_value("sella_connections") == 0


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def read_all(client: socket.socket) -> bytes:
    data = b""
    while more := client.recv(65536):
        data += more
    return data


@pytest.mark.parametrize(
    ("sent", "answer", "reason"),
    [
        (b"", b"", "head_timeout"),
        (b"GET /livez HT", b"HTTP/1.1 408", "head_timeout"),
        (HEAD + b"X-Slow: ", b"HTTP/1.1 408", "head_timeout"),
        (HEAD + b"Content-Length: 9\r\n\r\n{", b"HTTP/1.1 408", None),  # by the route itself
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", b"HTTP/1.1 408", None),
        # Answered before its body came: the connection does not stay for the rest.
        (b"GET /livez HTTP/1.1\r\nHost: sella\r\nContent-Length: 9\r\n\r\n{", b"HTTP/1.1 200", "body_timeout"),
        (b"GET /livez HTTP/1.1\r\nHost: sella\r\n\r\n", b"HTTP/1.1 200", "idle"),
        (b"GET /livez HTTP/1.1\r\nHost: sella\r\n\r\nGET /li", b"HTTP/1.1 200", "head_timeout"),
    ],
)
def test_a_client_that_does_not_go_on_is_cut_off(
    server: Listening, sent: bytes, answer: bytes, reason: str | None
) -> None:
    before = server.cut_off(reason) if reason else 0
    with closing(server.connect(sent)) as client:
        data = read_all(client)
    assert data.startswith(answer) and bool(data) == bool(answer)
    if b"408" in answer:
        assert b"_timeout" in data and all(name.lower().encode() in data.lower() for name in SECURITY_HEADERS)
    if reason:
        assert server.cut_off(reason) == before + 1


def test_a_byte_now_and_then_does_not_prolong_a_head_or_a_body(server: Listening) -> None:
    for start, drop in ((b"GET /", b"a"), (HEAD + b"Content-Length: 999\r\n\r\n", b" ")):
        with closing(server.connect(start)) as client:
            client.settimeout(0.05)
            data = b""
            end = time.monotonic() + 20
            while b"HTTP/1.1 408" not in data:
                assert time.monotonic() < end
                try:
                    client.sendall(drop)
                    data += client.recv(4096)
                except TimeoutError:
                    pass


def test_a_client_that_does_not_read_is_cut_off(server: Listening) -> None:
    before = server.cut_off("write_timeout")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", server.port))
    with closing(client):
        client.settimeout(0.2)
        try:
            while True:  # until nothing more fits
                client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: sella\r\n\r\n" * 50)
        except (TimeoutError, ConnectionError):
            pass
        wait_for(lambda: server.cut_off("write_timeout") == before + 1)
        assert server.cut_off("write_timeout") == before + 1
        # And reset, so that nothing stays behind in the kernel.
        wait_for(lambda: client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET)


def test_the_longest_waiting_gives_way_to_a_new_connection(server: Listening) -> None:
    waiting = [server.connect(b"GET /slow") for _ in range(3 * MOST)]
    before = server.cut_off("refused")
    assert httpx.get(f"http://127.0.0.1:{server.port}/livez", trust_env=False).status_code == 200
    assert server.cut_off("refused") == before
    assert server.cut_off("crowded_out") >= 2 * MOST
    assert len(server.connections) <= MOST
    for one in waiting:
        one.close()


def test_where_all_are_at_work_a_new_one_is_told_so(bundle: Bundle) -> None:
    with listening(bundle, max_connections=MOST) as server:
        engine = cast(EchoEngine, server.service.bundles.current.engine)
        engine.gate.clear()
        body = b'{"user_id": "u1", "candidates": ["i1"]}'
        asked = [server.connect(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body) for _ in range(MOST)]
        wait_for(lambda: len(server.connections) == MOST and len(server.server.server_state.tasks) == MOST)
        with closing(server.connect()) as client:
            data = read_all(client)
        assert (
            data.startswith(b"HTTP/1.1 503") and b"too_many_connections" in data and b"retry-after: 1" in data.lower()
        )
        assert server.cut_off("refused") == 1
        server.server.servers[0].get_loop().call_soon_threadsafe(engine.gate.set)
        for one in asked:
            assert one.recv(65536).startswith(b"HTTP/1.1 200")
            one.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"\0" * 100 + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n\r\n",  # no Host
        b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nX: a\r\n b: c\r\nX y: z\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nX\0: b\r\n\r\n",
        HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 0x10\r\n\r\n",
        HEAD
        + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        HEAD + b"X-Long: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 200_000,
    ],
)
def test_what_is_no_plain_request_gets_one_400_in_the_usual_shape(server: Listening, sent: bytes) -> None:
    with closing(server.connect()) as client:
        data = b""
        try:
            client.sendall(sent)
            data = read_all(client)
        except ConnectionError:
            pass  # the end of a long request met a closed connection
    assert data or len(sent) > 100_000
    if data:
        assert data.count(b'"request_id"') == 1
        assert data.startswith(b"HTTP/1.1 400") and b'"invalid_http"' in data
        assert b"\r\nx-content-type-options" in data.lower()


def padded(length: int) -> bytes:
    """A request whose head has this many bytes."""
    start, end = b"GET /livez HTTP/1.1\r\nHost: sella\r\nConnection: close\r\nX-Long: ", b"\r\n\r\n"
    return start + b"a" * (length - len(start) - len(end)) + end


@pytest.mark.parametrize("piece", [1_000_000, 65_536, 16_000, 5_000])
@pytest.mark.parametrize(("length", "status"), [(60_000, 200), (MAX_HEAD, 200), (MAX_HEAD + 1, 400), (240_000, 400)])
def test_a_head_has_one_bound_however_the_network_cuts_it(
    server: Listening, piece: int, length: int, status: int
) -> None:
    sent = padded(length)
    assert len(sent) == length
    with closing(server.connect()) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for start in range(0, length, piece):
                client.sendall(sent[start : start + piece])
                time.sleep(0.002)
            data = read_all(client)
        except ConnectionError:  # the end of a long head met a closed connection
            assert status == 400
        else:
            assert data.startswith(b"HTTP/1.1 %d" % status)


def test_a_head_behind_another_request_has_the_same_bound(server: Listening) -> None:
    first = b"GET /livez HTTP/1.1\r\nHost: sella\r\n\r\n"
    for length, statuses in ((MAX_HEAD, [b"200", b"200"]), (MAX_HEAD + 1, [b"200", b"400"])):
        with closing(server.connect(first + padded(length))) as client:
            assert re.findall(rb"HTTP/1.1 (\d+)", read_all(client)) == statuses


def test_a_head_has_only_so_many_headers(server: Listening) -> None:
    for count, status in ((MAX_HEADERS - 2, b"200"), (MAX_HEADERS + 1, b"400"), (10_000, b"400")):
        head = b"GET /livez HTTP/1.1\r\nHost: sella\r\nConnection: close\r\n" + b"a:b\r\n" * (count) + b"\r\n"
        with closing(server.connect(head)) as client:
            assert read_all(client).startswith(b"HTTP/1.1 " + status)


def test_a_client_that_leaves_in_its_body_is_no_invalid_request(server: Listening) -> None:
    value = server.service.metrics.registry.get_sample_value

    def counted(outcome: str) -> float:
        return value("sella_requests_total", {"route": "/rank", "outcome": outcome}) or 0

    before, invalid = counted("cancelled"), counted("invalid")
    for start in (b"Content-Length: 99\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"):
        server.connect(HEAD + start).close()
    wait_for(lambda: counted("cancelled") == before + 2)
    assert counted("invalid") == invalid
    # A body that is no HTTP is the client's fault.
    with closing(server.connect(HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n")) as client:
        assert read_all(client).startswith(b"HTTP/1.1 400")
    wait_for(lambda: counted("invalid") == invalid + 1)
    assert counted("cancelled") == before + 2


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_client_that_closes_its_side_has_left(server: Listening, version: bytes) -> None:
    """As `nc -N` does. It looks like one that gave up, whose work is dropped: those are far more."""
    body = b'{"user_id": "u1", "candidates": ["i1"]}'
    engine = cast(EchoEngine, server.service.bundles.current.engine)
    loop = server.server.servers[0].get_loop()
    value = server.service.metrics.registry.get_sample_value
    before = value("sella_refusals_total", {"reason": "client_gone"}) or 0
    loop.call_soon_threadsafe(engine.gate.clear)
    head = HEAD.replace(b"1.1", version) + b"Content-Length: %d\r\n\r\n" % len(body)
    with closing(server.connect(head + body)) as client:
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b""  # at once, and not when the score is there
    wait_for(lambda: value("sella_refusals_total", {"reason": "client_gone"}) == before + 1)
    loop.call_soon_threadsafe(engine.gate.set)


def test_as_many_connections_as_there_may_be_files(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(100_000, 100_000)]
    monkeypatch.setattr("resource.getrlimit", lambda _: limits[-1])
    monkeypatch.setattr("resource.setrlimit", lambda _, given: limits.append(given))
    settings = collaborators(bundle, EchoEngine(), max_connections=500).settings
    assert room_for_connections(settings, structlog.get_logger()) == 500
    assert len(limits) == 1
    limits[:] = [(256, 100_000)]
    assert room_for_connections(settings, structlog.get_logger()) == 500
    assert 500 < limits[-1][0] < 1000
    limits[:] = [(256, 400)]
    assert 8 <= room_for_connections(settings, structlog.get_logger()) < 400
    limits[:] = [(64, 64)]
    with pytest.raises(ValueError, match="this process may open 64 files"):
        room_for_connections(settings, structlog.get_logger())
