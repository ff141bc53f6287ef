"""Structured logs: one event a line, on standard error."""

import logging
import sys
from typing import Any

import structlog

from service.connections import LOGGER as CONNECTIONS_LOGGER
from service.settings import Settings


def configure_logs(settings: Settings) -> structlog.stdlib.BoundLogger:
    """Send structlog's events and the libraries' log records one way, and return the service's logger."""
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
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
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    # The service logs starts, stops and requests itself; of the server only what goes wrong is news.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    # Clients cause its warnings, and must not be able to fill the log.
    logging.getLogger(CONNECTIONS_LOGGER).setLevel(logging.ERROR)
    log: structlog.stdlib.BoundLogger = structlog.get_logger("sella")
    return log
