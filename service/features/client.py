"""Clients of Redis: short waits, no retries that outlast them, and addresses without their passwords."""

import re
from urllib.parse import urlsplit

import redis
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

URL = re.compile(r"^(rediss?|unix)://.+")

# Connections of one process. A look-up holds one for a millisecond or two; more would only wait for Redis's one thread.
_CONNECTIONS = 64
# A hundred candidates of Qwen2-7B are a megabyte: read it in few pieces.
_READ_BYTES = 1 << 20
_PUBLISH_TIMEOUT_S = 30.0


def open_client(url: str, timeout_s: float) -> Redis:
    """Return a client for requests; it connects when it is first used.

    A connection that Redis has closed is opened anew, once; nothing else is tried twice, because whoever asks has the
    embedded tables to go on with.

    Raises:
        ValueError: the address is none.
    """
    check_url(url)
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=_CONNECTIONS,
        timeout=timeout_s,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        socket_read_size=_READ_BYTES,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
    )
    return Redis.from_pool(pool)


def open_publisher(url: str) -> "redis.Redis":
    """Return a client for a command that writes for minutes and may wait.

    Raises:
        ValueError: the address is none.
    """
    check_url(url)
    return redis.Redis.from_url(
        url, socket_timeout=_PUBLISH_TIMEOUT_S, socket_connect_timeout=_PUBLISH_TIMEOUT_S, protocol=2
    )


def check_url(url: str) -> str:
    """Return the address of a Redis.

    Raises:
        ValueError: it is none.
    """
    if not URL.match(url) or not _has_usable_port(url):
        raise ValueError(
            f"{shown(url)}: not an address of Redis; give redis://host:6379/0, rediss://… or unix:///path, with"
            " whatever a password has besides letters and digits percent-encoded"
        )
    return url


def _has_usable_port(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.port is None or parts.port > 0
    except ValueError:  # as where a / or # in a password ends what stands for the port; the message quotes it
        return False


def shown(url: str) -> str:
    """Return an address as it may stand in a log: without user, password and query, however they are written."""
    before, at, host = url.rpartition("@")
    if "?" in before:  # of a query or of a password: which part is which cannot be told
        host = "…"
    return f"{url.partition(':')[0]}://{host}".partition("?")[0] if at else url.partition("?")[0]
