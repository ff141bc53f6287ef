"""Structured logs: one event a line, on standard error, the libraries' in the same form.

Titles and user ids are no news above debug level. The service's own events have none; an exception's message and a
library's record may quote anything, so of those only what cannot quote is kept: types and places, and first lines.
"""

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from types import TracebackType
from typing import Any, TextIO

import structlog

from service.connections import LOGGER as CONNECTIONS_LOGGER
from service.settings import Settings

WAITING_LINES = 10_000  # a few megabytes
LINES_AT_ONCE, TOGETHER_S = 100, 0.002  # one write for what comes together
FLUSH_S = 1.0

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]


def configure_logs(settings: Settings) -> structlog.stdlib.BoundLogger:
    """Send structlog's events and the libraries' log records one way, and return the service's logger."""
    debugging = settings.log_level == "debug"
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,  # the request's id
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info
        if debugging
        else structlog.processors.ExceptionRenderer(_without_messages),
    ]
    foreign = [structlog.stdlib.add_logger_name, *shared, *([] if debugging else [_first_line])]
    console = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    renderer: Any = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = PatientHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=foreign,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    # The service logs starts, stops and requests itself; of the libraries only what goes wrong is news.
    for name in ("uvicorn", "httpx", "opentelemetry"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Clients cause its warnings, and must not be able to fill the log.
    logging.getLogger(CONNECTIONS_LOGGER).setLevel(logging.ERROR)
    log: structlog.stdlib.BoundLogger = structlog.get_logger("sella")
    return log


class PatientHandler(logging.Handler):
    """Writes lines from a thread of its own: a pipe, a terminal or a disk that takes nothing must not stop the service.

    What comes while `WAITING_LINES` wait is dropped; how many were is the next line that can be written. A stream that
    is no file is written at once.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: deque[str] = deque()
        self._taken = self._written = self._dropped = 0
        self._news = threading.Event()
        try:
            self._file: int | None = stream.fileno()
        except (OSError, ValueError):
            self._file = None
        else:
            threading.Thread(target=self._run, name="logs", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record; it is written within milliseconds. Handlers are called by one thread at a time."""
        try:
            line = f"{self.format(record)}\n"
            if self._file is None:
                self._stream.write(line)
                return
        except Exception:
            self.handleError(record)
            return
        if self._taken - self._written >= WAITING_LINES:
            self._dropped += 1
        else:
            self._taken += 1
            self._lines.append(line)
            self._news.set()

    def flush(self) -> None:
        """Wait until what was taken is written, but not for a file that takes nothing."""
        end = time.monotonic() + FLUSH_S
        while self._file is not None and self._written < self._taken and time.monotonic() < end:
            time.sleep(0.001)

    def _run(self) -> None:
        while True:
            self._news.wait()
            time.sleep(TOGETHER_S)
            self._news.clear()
            while lines := [self._lines.popleft() for _ in range(min(len(self._lines), LINES_AT_ONCE))]:
                text = "".join(lines)
                if self._dropped:
                    text += json.dumps({"event": "lines_dropped", "level": "warning", "lines": self._dropped}) + "\n"
                    self._dropped = 0
                self._write(text.encode(errors="backslashreplace"))
                self._written += len(lines)

    def _write(self, text: bytes) -> None:
        """Write to the file itself: a stream's lock, held while it waits, would stop the end of the process."""
        assert self._file is not None
        with suppress(OSError):  # nobody reads it any more
            while text:
                text = text[os.write(self._file, text) :]


def _without_messages(exc_info: _ExcInfo) -> str:
    """Write an exception and what it came from as types and places: a message may quote a title or an id."""
    return "\n".join(line.rstrip("\n") for line in _lines(exc_info[1], set()))


def _lines(error: BaseException, seen: set[int]) -> Iterator[str]:
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None and id(before) not in seen:
        yield from _lines(before, seen)
        yield "which led to:"
    yield from traceback.format_tb(error.__traceback__)
    yield f"{type(error).__module__}.{type(error).__qualname__} (its message is logged at debug level)"


def _first_line(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Cut a library's record after its first line: asyncio writes the whole of a task and its error below."""
    event["event"] = str(event["event"]).split("\n", 1)[0]
    return event
