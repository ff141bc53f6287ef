"""Structured logs: one event a line, on standard error, the libraries' in the same form.

Titles and user ids are no news above debug level. The service's own events have none; an exception's message and a
library's record may quote anything, so of those only what cannot quote is kept: types and places, and first lines.
"""

import logging
import sys
import traceback
from collections.abc import Iterator, MutableMapping
from types import TracebackType
from typing import Any

import structlog

from service.connections import LOGGER as CONNECTIONS_LOGGER
from service.settings import Settings

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
    handler = logging.StreamHandler(sys.stderr)
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
