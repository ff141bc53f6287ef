"""Connections that end when their client is too slow, and that never become more than the process can hold.

uvicorn bounds how long a connection is idle after an answer, and nothing else: a client that sends a byte a minute, or
that never reads, keeps its connection, and enough of them take every file descriptor. Here a connection is always in
one phase, a phase has a limit, and one sweep a second ends what is over it.
"""

import asyncio
import logging
import re
import resource
import socket
import struct
import uuid
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import h11
import structlog
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from service.answers import ErrorResponse, Problem
from service.errors import RETRY_SOON_S
from service.headers import SECURITY_HEADERS
from service.metrics.connections import ConnectionMetrics
from service.settings import Settings, SettingsError

SWEEP_S = 1.0
# Files that are no connections: the listener, the event loop's, pipes to the worker, tables, logs, those of a restart.
RESERVED_FILES = 128
MIN_CONNECTIONS = 8
# Of a request's line and headers together, and of the headers' number. A browser's are some kilobytes, some thirty.
MAX_HEAD = 65_536
MAX_HEADERS = 200
RESET = struct.pack("ii", 1, 0)  # linger, for no time
# uvicorn warns of each request that is no HTTP or offers an upgrade. A client must not be able to fill the log.
LOGGER = "uvicorn.error.connections"


_HEAD_END = re.compile(rb"\n\r?\n")


class Phase(Enum):
    """What a connection waits for."""

    SILENT = "its first byte"
    HEAD = "the rest of a request's head"
    BODY = "the rest of a request's body"
    ANSWER = "us"
    UNREAD = "the client to read its answer"
    REST = "the end of a body that was answered before it had all come"
    IDLE = "another request"
    CLOSING = "its last bytes to be read"


class _BoundedHead(h11.Connection):
    """h11, with one bound of a head. Its own is of what is incomplete: what comes in one packet passes it."""

    def next_event(self) -> Any:
        """Return the next event; a head over the bound is an error before it is parsed."""
        if self.their_state is h11.IDLE:
            waiting = self.trailing_data[0]
            end = _HEAD_END.search(waiting)
            head = waiting if end is None else waiting[: end.end()]
            if len(head) > MAX_HEAD or head.count(b"\n") > MAX_HEADERS + 2:
                raise h11.RemoteProtocolError("the head of the request is too long")
        return super().next_event()


class Connections:
    """The server's open connections: how many, how long each may stay in a phase, and which one gives way."""

    def __init__(self, settings: Settings, most: int, metrics: ConnectionMetrics) -> None:
        self._most = most
        self._metrics = metrics
        self._open: set[BoundedProtocol] = set()
        # Those that wait for their clients, in the order in which they began to.
        self._waiting: dict[BoundedProtocol, None] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._limits: Mapping[Phase, tuple[float, str]] = {
            Phase.SILENT: (settings.head_timeout_s, "head_timeout"),
            Phase.HEAD: (settings.head_timeout_s, "head_timeout"),
            # A route that reads its body answers in time with 408 by itself. This is for the others.
            Phase.BODY: (settings.body_timeout_s + SWEEP_S, "body_timeout"),
            Phase.REST: (min(settings.body_timeout_s, 5.0), "body_timeout"),
            Phase.IDLE: (settings.keep_alive_s, "idle"),
            Phase.UNREAD: (settings.write_timeout_s, "write_timeout"),
            Phase.CLOSING: (settings.write_timeout_s, "write_timeout"),
        }

    def protocol(self, **given: Any) -> "BoundedProtocol":
        """Return a new connection's protocol: uvicorn's factory."""
        return BoundedProtocol(self, **given)

    def __len__(self) -> int:
        return len(self._open)

    def opened(self, connection: "BoundedProtocol") -> bool:
        """Take a connection in, if need be for the one that has waited longest for its client; return whether.

        A client that is at it takes milliseconds, so that it is a slow or an idle one that goes.
        """
        if len(self._open) >= self._most:
            waiting = next(iter(self._waiting), None)
            if waiting is None:
                self._metrics.cut_off("refused")
                return False
            self._metrics.cut_off("crowded_out")
            self.closed(waiting)
            waiting.cut()
        self._open.add(connection)
        self._metrics.opened()
        if self._sweep is None:
            self._sweep = connection.loop.call_later(SWEEP_S, self._end_slow, connection.loop)
        return True

    def entered(self, connection: "BoundedProtocol", phase: Phase) -> None:
        """Note that a connection entered a phase."""
        self._waiting.pop(connection, None)
        if phase is not Phase.ANSWER and connection in self._open:
            self._waiting[connection] = None

    def closed(self, connection: "BoundedProtocol") -> None:
        """Let a connection out."""
        self._waiting.pop(connection, None)
        if connection in self._open:
            self._open.remove(connection)
            self._metrics.closed()

    def invalid(self) -> None:
        """Count a connection that spoke no HTTP."""
        self._metrics.cut_off("invalid_http")

    def _end_slow(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for connection in list(self._open):
            limit = self._limits.get(connection.phase)
            if limit is not None and now - connection.since > limit[0]:
                self._metrics.cut_off(limit[1])
                connection.end()
        # Stops with the last connection, so that the server's end finds no timer.
        self._sweep = loop.call_later(SWEEP_S, self._end_slow, loop) if self._open else None


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 connection, in phases that end."""

    def __init__(self, connections: Connections, **given: Any) -> None:
        super().__init__(**given)
        self.conn = _BoundedHead(h11.SERVER, MAX_HEAD)
        self.logger = logging.getLogger(LOGGER)
        self.phase = Phase.SILENT
        self.since = self.loop.time()
        self._connections = connections
        self._seen_cycle: object = None  # tells one request's phases from the next's

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or say that there are too many."""
        self.transport = transport
        if not self._connections.opened(self):
            self._tell(503, "too_many_connections", "too many connections are open; retry", RETRY_SOON_S)
            transport.close()
            return
        super().connection_made(transport)
        self._enter(Phase.SILENT)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._connections.closed(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read what came."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        """Wait for another request. uvicorn's own timer is replaced by the sweep, which no half-sent request stops."""
        super().on_response_complete()
        self._unset_keepalive_if_required()
        self._follow()

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered."""
        super().pause_writing()
        self._follow()

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        self._follow()

    def shutdown(self) -> None:
        """End with the server, after the request that runs."""
        super().shutdown()
        self._follow()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP in the shape of every error, and close; uvicorn's answer is text, and may raise."""
        self._connections.invalid()
        if self.cycle is not None:
            self.cycle.scope["state"]["invalid_http"] = True  # the client did not leave
        self._leave_request()
        self._tell(400, "invalid_http", "this is no HTTP/1.1 request that can be understood")
        self.transport.close()

    def end(self) -> None:
        """End the connection for the time that its phase has taken, with 408 where that can be read and understood."""
        if self.phase in (Phase.UNREAD, Phase.CLOSING):
            self.cut()
            return
        if self.phase in (Phase.HEAD, Phase.BODY):
            self._leave_request()
            self._tell(408, f"{self.phase.name.lower()}_timeout", f"{self.phase.value} did not arrive in time")
        self.transport.close()
        self._follow()

    def cut(self) -> None:
        """End the connection at once, whatever is under way."""
        self._leave_request()
        # Reset, not closed: the kernel would keep what was not read, and offer it to the client for many minutes.
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.transport.abort()

    def _follow(self) -> None:
        phase = self._current_phase()
        if phase is not self.phase or self.cycle is not self._seen_cycle:
            self._enter(phase)

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self.since = self.loop.time()
        self._seen_cycle = self.cycle
        self._connections.entered(self, phase)

    def _current_phase(self) -> Phase:
        if self.transport.is_closing():
            return Phase.CLOSING
        if self.flow.write_paused:
            return Phase.UNREAD
        answered = self.cycle is None or self.cycle.response_complete
        if self.conn.their_state is h11.SEND_BODY:
            return Phase.REST if answered else Phase.BODY
        if not answered:
            return Phase.ANSWER
        if self.conn.trailing_data[0]:
            return Phase.HEAD
        return Phase.SILENT if self.cycle is None else Phase.IDLE

    def _leave_request(self) -> None:
        """Let the running request, if any, know that nobody hears its answer."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _tell(self, status: int, code: str, message: str, retry_after_s: int | None = None) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return  # an answer has begun
        request_id = uuid.uuid4().hex
        error = ErrorResponse(error=Problem(code=code, message=message), request_id=request_id)
        body = error.model_dump_json(exclude_none=True).encode()
        headers = {
            **SECURITY_HEADERS,
            "X-Request-ID": request_id,
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
        }
        if retry_after_s is not None:
            headers["Retry-After"] = str(retry_after_s)
        for event in (
            h11.Response(status_code=status, headers=list(headers.items()), reason=STATUS_PHRASES[status]),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")


def room_for_connections(settings: Settings, log: structlog.stdlib.BoundLogger) -> int:
    """Return how many connections there may be, after asking the system for as many open files as they need.

    Raises:
        SettingsError: not even a few would fit.
    """
    others = _open_files() + RESERVED_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_connections + others
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return settings.max_connections
    if soft - others < MIN_CONNECTIONS:
        raise SettingsError(
            f"this process may open {soft} files, {others} of them are taken; raise it: ulimit -n {wanted}"
        )
    log.warning("few_files", limit=soft, connections=soft - others, wanted=settings.max_connections)
    return soft - others


def _open_files() -> int:
    try:
        return len(list(Path("/proc/self/fd").iterdir()))
    except OSError:  # not Linux
        return RESERVED_FILES
