"""The gate before every route: who asks, whether they may, and whether not too often. No body is read here."""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import structlog
from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from service.access.key_file import KeyFile
from service.access.keys import Key, KeyFileError
from service.access.rates import RateLimiter
from service.errors import NOT_FOUND, error_response
from service.metrics.registry import Metrics
from service.settings import Settings

ADMIN = "admin"
OPEN_ROUTES = frozenset({"/livez", "/readyz"})
# What an operator looks at: on the port of the metrics nobody is asked for a key, elsewhere they ask for one.
OPERATOR_ROUTES = frozenset({"/metrics", "/docs", "/openapi.json"})
# Each takes the event loop some milliseconds. A scraper asks once in 15 s; a person reloads.
OPERATOR_RATE = 10.0
# Refusals a second for a missing or unknown key that one address is told 401 for, then 429. A client that has
# lost its key sees the 401 first.
FAILURE_RATE, FAILURE_BURST_S = 5.0, 10.0
# Refusals a second that are logged: strangers must not be able to fill the log. The metrics count all.
LOG_RATE = 1.0
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="sella"'}


class Need(StrEnum):
    """What a route asks of its caller."""

    NOTHING = "nothing"
    KEY = "key"
    ADMIN_KEY = "admin key"


class RefusedError(Exception):
    """A request that may not pass; says how it is answered. `reason` is the metric's label."""

    def __init__(self, status: int, code: str, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.reason = reason


@dataclass(frozen=True)
class Access:
    """Which keys open what. A file that is None was not given."""

    api_keys: KeyFile | None
    admin_keys: KeyFile | None
    anonymous: bool
    metrics_port: int | None = None  # the port on which the operator's routes are served without a key

    @classmethod
    def open(cls, settings: Settings, log: structlog.stdlib.BoundLogger) -> "Access":
        """Read the key files that the settings name.

        Raises:
            KeyFileError: a file cannot be used, or the address is open to others and no file says who they are.
        """
        loopback = is_loopback(settings.host)
        if settings.api_keys_file is None and not loopback and not settings.allow_anonymous:
            raise KeyFileError(
                f"{settings.host} can be reached by others and no keys are asked for: name a file of keys with"
                " SELLA_API_KEYS_FILE, or say SELLA_ALLOW_ANONYMOUS=true if something before the service checks callers"
            )
        api, admin = (
            None if path is None else _watched(path, log) for path in (settings.api_keys_file, settings.admin_keys_file)
        )
        return cls(api, admin, anonymous=loopback and api is None and admin is None)

    def admit(self, need: Need, headers: Headers) -> Key | None:
        """Return the caller's key, or None for somebody without one where none is needed.

        Raises:
            RefusedError: the caller may not.
        """
        if need is Need.NOTHING or self.anonymous:
            return None
        if need is Need.KEY and self.api_keys is None:
            return None
        if need is Need.ADMIN_KEY and self.admin_keys is None:
            message = "administration is closed: start the service with SELLA_ADMIN_KEYS_FILE"
            raise RefusedError(403, "forbidden", "forbidden", message)
        secret = _secret(headers)
        # Both files are always searched, so that the time tells nothing of which one holds a key.
        admin_key = None if self.admin_keys is None else self.admin_keys.ring().find(secret)
        api_key = None if self.api_keys is None else self.api_keys.ring().find(secret)
        if admin_key is not None:  # opens every route
            return admin_key
        if api_key is None:
            raise RefusedError(401, "unauthorized", "unknown", "this key is not known; it may have been replaced")
        if need is Need.ADMIN_KEY:
            raise RefusedError(403, "forbidden", "forbidden", "this route takes an admin key")
        return api_key


class Gate:
    """ASGI middleware: lets through who may pass."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        settings: Settings,
        metrics: Metrics,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self._app = app
        self._access = access
        self._rate = settings.rate_limit
        self._limiter = RateLimiter(settings.rate_burst_s)
        self._failures = RateLimiter(FAILURE_BURST_S)
        self._metrics = metrics
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or answer it with 401, 403 or 429."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = _matched(scope["app"].routes, scope)
        need = need_of(route, scope["method"])
        headers = Headers(scope=scope)
        if self._access.metrics_port is not None and scope["server"][1] == self._access.metrics_port:
            if getattr(route, "path", "") not in OPEN_ROUTES | OPERATOR_ROUTES:
                await error_response(scope["state"]["request_id"], 404, "not_found", NOT_FOUND)(scope, receive, send)
                return
            need, trusted = Need.NOTHING, True
        else:
            trusted = need is not Need.NOTHING or self._trusts(headers)
        try:
            key = self._access.admit(need, headers)
        except RefusedError as refusal:
            scope["route"] = route
            await self._refuse(refusal, scope, receive, send)
            return
        scope["state"]["key_name"] = None if key is None else key.name
        scope["state"]["trusted"] = trusted
        wait_s = self._wait_s(need, key, getattr(route, "path", ""), scope)
        if wait_s:
            scope["route"] = route
            message = "more requests than this client may send; Retry-After says when the next may come"
            await self._limit(message, wait_s, scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _trusts(self, headers: Headers) -> bool:
        """Return whether the caller of an open route could call one that asks for a key."""
        try:
            self._access.admit(Need.KEY, headers)
        except RefusedError:
            return False
        return True

    async def _refuse(self, refusal: RefusedError, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.access.unauthorized(refusal.reason)
        wait_s = self._failures.take(_address(scope), FAILURE_RATE)
        if wait_s:
            message = f"too many requests without a known key; {refusal}"
            await self._limit(message, wait_s, scope, receive, send)
            return
        self._note(scope, refusal.code, refusal.status)
        response = error_response(scope["state"]["request_id"], refusal.status, refusal.code, str(refusal))
        if refusal.status == 401:
            response.headers.update(_CHALLENGE)
        await response(scope, receive, send)

    async def _limit(self, message: str, wait_s: int, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.access.rate_limited()
        self._metrics.refused("rate_limit")
        self._note(scope, "rate_limited", 429)
        request_id = scope["state"]["request_id"]
        await error_response(request_id, 429, "rate_limited", message, retry_after_s=wait_s)(scope, receive, send)

    def _note(self, scope: Scope, code: str, status: int) -> None:
        if not self._failures.take("log", LOG_RATE):
            self._log.info("refused", request_id=scope["state"]["request_id"], code=code, status=status)

    def _wait_s(self, need: Need, key: Key | None, path: str, scope: Scope) -> int:
        if path in OPERATOR_ROUTES and not self._access.anonymous:
            wait_s = self._limiter.take(f"operator {_address(scope)}", OPERATOR_RATE)
            if wait_s:
                return wait_s
        rate = self._rate if key is None or key.requests_per_s is None else key.requests_per_s
        if need is Need.NOTHING or rate is None:
            return 0
        return self._limiter.take(f"key {key.name}" if key else f"address {_address(scope)}", rate)


def _watched(path: Path, log: structlog.stdlib.BoundLogger) -> KeyFile:
    file = KeyFile(path, log)
    file.watch()
    return file


def need_of(route: BaseRoute | None, method: str) -> Need:
    """Return what a route asks for. One that is not listed asks for a key: a new route is closed until it is opened."""
    path = getattr(route, "path", "")
    if path in OPEN_ROUTES:
        return Need.NOTHING
    tags: Iterable[object] = getattr(route, "tags", None) or ()
    if ADMIN in tags or path == "/admin" or path.startswith("/admin/") or (route is not None and method == "DELETE"):
        return Need.ADMIN_KEY
    return Need.KEY


def is_loopback(host: str) -> bool:
    """Return whether an address can only be reached from this machine; of names, only `localhost` is known to be."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _matched(routes: Iterable[BaseRoute], scope: Scope) -> BaseRoute | None:
    """Return the route that will answer: the first that matches, or one that matches but for the method."""
    partial = None
    for route in routes:
        match, _ = route.matches(scope)
        if match is Match.FULL:
            return route
        if match is Match.PARTIAL and partial is None:
            partial = route
    return partial


def _secret(headers: Headers) -> bytes:
    """Return the one key that a request carries.

    Raises:
        RefusedError: it carries none, several that differ, or credentials of another kind.
    """
    sent = {one.strip() for one in headers.getlist("x-api-key")}
    for one in headers.getlist("authorization"):
        scheme, _, rest = one.strip().partition(" ")
        if scheme.lower() != "bearer":
            raise RefusedError(401, "unauthorized", "malformed", "send Authorization: Bearer KEY, or X-API-Key: KEY")
        sent.add(rest.strip())
    if len(sent) > 1:
        raise RefusedError(401, "unauthorized", "malformed", "the request carries several keys; send one")
    secret = sent.pop() if sent else ""
    if not secret:
        raise RefusedError(401, "unauthorized", "missing", "send Authorization: Bearer KEY, or X-API-Key: KEY")
    return secret.encode("latin-1")


def _address(scope: Scope) -> str:
    """Return whom an anonymous request is counted for: an IPv4 address, or the /64 that one IPv6 client owns."""
    host = scope["client"][0] if scope.get("client") else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return str(host)
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address, 64), strict=False))
