"""What every request passes first: an id, a count, and, for those with a body, checks before it is read."""

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Coroutine
from email.message import Message as MimeMessage
from typing import Any

import structlog
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from service.bodies import Bodies
from service.errors import NOT_FOUND, RETRY_SOON_S, MediaTypeError, RequestError, error_response
from service.headers import security_headers
from service.metrics.registry import Metrics
from service.schemas import RequestBody

REQUEST_ID_HEADER = "X-Request-ID"
HTTP_VERSIONS = ("1.0", "1.1")
UNMATCHED = "unmatched"
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
REFUSED = 429
TIMEOUT_HEADER = "X-Request-Timeout-Ms"
# Names that clients send who mean it. Ignored, the request would get the default deadline without a word.
_DEADLINE = re.compile(r"(x[-_]?)?request[-_]?(tim\w{0,2}out|deadline)[-_]?\w{0,12}|x[-_](timeout|deadline)[-_]?(ms)?")
_OUTCOMES = {REFUSED: "refused", 499: "cancelled", 503: "unavailable", 504: "expired"}


class Intake:
    """ASGI middleware: gives each request its id and counts it once, by route and outcome."""

    def __init__(self, app: ASGIApp, metrics: Metrics, log: structlog.stdlib.BoundLogger) -> None:
        self._app = app
        self._metrics = metrics
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id
        with bound_contextvars(request_id=request_id):  # every record says which request it belongs to
            await self._pass_on(scope, receive, send, request_id)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        started = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status == REFUSED:
                    self._metrics.refusal_took(time.monotonic() - started)
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = request_id
                headers.update(security_headers(scope["path"]))
            await send(message)

        try:
            if malformed := _malformed(scope):
                refusal = error_response(request_id, 400, "invalid_http", malformed)
                refusal.headers["Connection"] = "close"
                await refusal(scope, receive, send_with_id)
            elif _has_line_break(scope["path"]):
                # Routes are matched by expressions in which `$` is also the place before a line break at the end:
                # /rank%0A would be /rank, and /users/u1%0A the user u1.
                await error_response(request_id, 404, "not_found", NOT_FOUND)(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            # The server stops, and SELLA_DRAIN_S did not suffice for this request.
            self._metrics.refused("stopping")
            self._log.warning(
                "refused", request_id=request_id, code="stopping", status=503, detail="cut off by the end"
            )
            if not status:
                message = "the server stops and could not finish this request; send it to another"
                refusal = error_response(request_id, 503, "stopping", message, retry_after_s=RETRY_SOON_S)
                await refusal(scope, receive, send_with_id)
        except Exception:
            self._log.exception("internal_error", request_id=request_id, route=_route(scope))
            if not status:
                message = "something went wrong here, not in the request; the log holds it under this request id"
                await error_response(request_id, 500, "internal_error", message)(scope, receive, send_with_id)
        finally:
            self._metrics.answered(_route(scope), _outcome(status))


class PlainRoute(APIRoute):
    """A route that refuses what it would not read: query parameters, and a deadline under another header's name."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the route's handler behind the checks."""
        handler = super().get_route_handler()
        has_deadline = any(one.alias == TIMEOUT_HEADER for one in self.dependant.header_params)

        async def checked(request: Request) -> Response:
            if request.scope["query_string"]:
                name = next(iter(request.query_params), "")
                raise RequestError(f"no route has query parameters, and this one has {name[:40]!r}; leave it out")
            if has_deadline:
                _require_deadline_header(request.headers)
            return await self.handle_plain(handler, request)

        return checked

    async def handle_plain(
        self, handler: Callable[[Request], Coroutine[Any, Any, Response]], request: Request
    ) -> Response:
        """Pass the request on."""
        return await handler(request)


class JsonRoute(PlainRoute):
    """A route whose body is plain JSON within limits; FastAPI sees only what was parsed and checked before."""

    async def handle_plain(
        self, handler: Callable[[Request], Coroutine[Any, Any, Response]], request: Request
    ) -> Response:
        """Read and parse the body, and pass both on."""
        model = None if self.body_field is None else self.body_field.field_info.annotation
        assert isinstance(model, type) and issubclass(model, RequestBody), "a body is one model"
        _require_json(request.headers)
        bodies: Bodies = request.app.state.bodies
        body = await bodies.read(request)
        return await handler(_Parsed(request, body, await bodies.parse(body, model)))


class _Parsed(Request):
    """A request whose body was parsed: FastAPI leaves an instance of the model as it is."""

    def __init__(self, request: Request, body: bytes, parsed: RequestBody) -> None:
        super().__init__(request.scope, request.receive)
        self._body = body
        self._json = parsed


def _require_json(headers: Headers) -> None:
    declared = headers.get("content-type")
    if declared is None:
        raise MediaTypeError("the body has no content type")
    parsed = MimeMessage()
    parsed["content-type"] = declared
    if parsed.get_content_type() != "application/json":
        raise MediaTypeError("the body's content type is not JSON")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise MediaTypeError("the body is encoded")


def _require_deadline_header(headers: Headers) -> None:
    for name in headers:
        if name != TIMEOUT_HEADER.lower() and _DEADLINE.fullmatch(name):
            raise RequestError(f"the deadline is {TIMEOUT_HEADER}, in milliseconds; this header is not read", name)


def _malformed(scope: Scope) -> str:
    """Return what is wrong with a request that the HTTP parser lets pass, or ""."""
    if scope["http_version"] not in HTTP_VERSIONS:
        return "send HTTP/1.1"
    names = {name for name, _ in scope["headers"]}
    if b"content-length" in names and b"transfer-encoding" in names:
        # A proxy that believes the other one of the two sees another end of this request, and so another next request.
        return "the request has both Content-Length and Transfer-Encoding; send one"
    return ""


def _has_line_break(path: str) -> bool:
    return "\n" in path or "\r" in path


def _request_id(headers: Headers) -> str:
    sent = headers.get(REQUEST_ID_HEADER, "")
    return sent if _SANE_ID.fullmatch(sent) else uuid.uuid4().hex


def _route(scope: Scope) -> str:
    """Return the route's template. A path that no route matches must not become a label."""
    return getattr(scope.get("route"), "path", UNMATCHED)


def _outcome(status: int) -> str:
    if status < 400:
        return "ok" if status else "error"
    return _OUTCOMES.get(status, "invalid" if status < 500 else "error")
