"""Clients of Redis: short waits, no retries that outlast them, and addresses without their passwords."""

import os
import re
import ssl
from collections.abc import Callable, Mapping
from urllib.parse import SplitResult, parse_qsl, urlsplit

import redis
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

URL = re.compile(r"^(rediss?|unix)://[^\s\x00-\x1f\x7f]+")

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
    return Redis.from_pool(_pool(url, timeout_s))


def open_publisher(url: str, timeout_s: float = _PUBLISH_TIMEOUT_S) -> "redis.Redis":
    """Return a client for work that takes minutes and may wait; `timeout_s` is for one command.

    Raises:
        ValueError: the address is none.
    """
    check_url(url)
    return redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, protocol=2)


def check_url(url: str) -> str:
    """Return the address of a Redis: what would fail at each use of it fails here, its certificates included.

    Raises:
        ValueError: it is none; the message is one line and quotes no password.
    """
    try:
        parts = urlsplit(url) if URL.fullmatch(url) else None
        port_unusable = parts is None or parts.port == 0
    except ValueError:  # as where a / or # in a password ends what stands for the port; the message quotes it
        parts, port_unusable = None, True
    if parts is None or port_unusable:
        raise ValueError(
            f"{shown(url)}: not an address of Redis; give redis://host:6379/0, rediss://… or unix:///path, with"
            " whatever a password has besides letters and digits percent-encoded"
        )
    reason = _place_problem(parts) or _options_problem(parts)
    if not reason:
        try:
            connection: object = _pool(url, 1.0).make_connection()  # type: ignore[no-untyped-call]
            if isinstance(connection, SSLConnection):
                connection.ssl_context.get()
        except (RedisError, ssl.SSLError, OSError, ValueError, TypeError) as error:
            reason = f"{error.strerror or error}" if isinstance(error, OSError) else str(error)
            reason = f"its options cannot be used together ({reason or type(error).__name__})"
    if reason:
        raise ValueError(f"{shown(url)}: {reason}")
    return url


def _pool(url: str, timeout_s: float) -> BlockingConnectionPool:
    return BlockingConnectionPool.from_url(
        url,
        max_connections=_CONNECTIONS,
        timeout=timeout_s,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        socket_read_size=_READ_BYTES,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
    )


def _place_problem(parts: SplitResult) -> str:
    """Return what is wrong with the host, the path or the database of an address; "" if nothing is."""
    if parts.fragment:
        return "what follows # is no part of an address; percent-encode a # in a path or a password as %23"
    if parts.scheme == "unix":
        return "" if parts.path and not parts.hostname else "names no socket; give unix:///path/to/redis.sock"
    try:
        (parts.hostname or "localhost").encode("idna")
    except UnicodeError:
        return "the host is no host name"
    database = parts.path.strip("/")
    if database and not _is_database(database):
        return f"/{database[:40]} is no database; give a number, as redis://host:6379/0"
    asked = dict(parse_qsl(parts.query)).get("db", database)
    if database and _is_database(asked) and int(asked) != int(database):
        return f"the path names database {database} and the option db names {asked}; give one of them"
    return ""


def _is_database(text: str) -> bool:
    return re.fullmatch("[0-9]{1,9}", text) is not None


def _is_seconds(text: str) -> bool:
    try:
        return 0 < float(text) < 86_400
    except ValueError:
        return False


def _is_count(text: str) -> bool:
    return re.fullmatch("[1-9][0-9]{0,5}", text) is not None


def _is_flag(text: str) -> bool:
    return text.lower() in ("true", "false", "yes", "no", "1", "0")


_Check = Callable[[str], bool]
_ANY: _Check = bool
# What an address may say of a connection, and how the service knows that it can be used. Other options of redis-py
# would change answers (decode_responses, protocol) or take objects that no address can name (retry, parser_class).
_OPTIONS: dict[str, tuple[_Check, str]] = {
    "db": (_is_database, "a number from 0"),
    "username": (_ANY, "a name"),
    "password": (_ANY, "a password"),
    "client_name": (lambda text: re.fullmatch(r"[!-~]+", text) is not None, "a name without blanks"),
    "max_connections": (_is_count, "a number from 1"),
    **dict.fromkeys(("socket_timeout", "socket_connect_timeout", "timeout"), (_is_seconds, "seconds")),
    "health_check_interval": (lambda text: text == "0" or _is_count(text), "whole seconds"),
    "socket_keepalive": (_is_flag, "true or false"),
    "ssl_cert_reqs": (("none", "optional", "required").__contains__, "none, optional or required"),
    "ssl_check_hostname": (_is_flag, "true or false"),
    "ssl_min_version": (("771", "772").__contains__, "771 (TLS 1.2) or 772 (TLS 1.3)"),
    **dict.fromkeys(("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"), (_ANY, "a file")),
    "ssl_ca_path": (os.path.isdir, "a folder that is there"),
    **dict.fromkeys(("ssl_ca_data", "ssl_ciphers", "ssl_password"), (_ANY, "text")),
}


def _options_problem(parts: SplitResult) -> str:
    """Return what is wrong with the options of an address; "" if nothing is."""
    try:
        given = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True) if parts.query else []
    except ValueError:
        return "its options are not of the form ?name=value&name=value"
    names = [name for name, _ in given]
    for name, value in given:
        if name not in _OPTIONS:
            return f"there is no option {name[:40]!r}; there are {', '.join(_OPTIONS)}"
        if names.count(name) > 1:
            return f"the option {name} stands twice"
        usable, wanted = _OPTIONS[name]
        if not usable(value):
            return f"the option {name} must be {wanted}"
        if name.startswith("ssl_") and parts.scheme != "rediss":
            return f"the option {name} needs rediss://"
    return ""


def evicting(memory: Mapping[str, object]) -> str:
    """Return the policy by which Redis removes keys when its memory is full, from INFO memory; "" for none."""
    policy = str(memory.get("maxmemory_policy", "noeviction"))
    return "" if policy == "noeviction" else policy


def evicts(policy: str) -> str:
    """Return what to do about a Redis that removes keys."""
    return (
        f"Redis removes keys when its memory is full (maxmemory-policy {policy}), likes and deletions too;"
        " set maxmemory-policy noeviction"
    )


def shown(url: str) -> str:
    """Return an address as it may stand in a log: without user, password and query, however they are written."""
    before, at, host = url.rpartition("@")
    if "?" in before:  # of a query or of a password: which part is which cannot be told
        host = "…"
    told = f"{url.partition(':')[0]}://{host}".partition("?")[0] if at else url.partition("?")[0]
    return "".join(one if one.isprintable() else "…" for one in told)
