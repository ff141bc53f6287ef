"""Every error that a client can see: its code, its status, and the one shape it is told in."""

from collections.abc import Sequence
from typing import Any, ClassVar

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service.admission import QueueFullError
from service.answers import ErrorResponse, Problem
from service.batcher import DeadlineExceededError
from service.engines.protocol import EngineError, EngineUnavailableError, JobDroppedError
from service.interactions.writer import LogUnansweredError, LogUnavailableError
from service.metrics.registry import Metrics

MAX_MESSAGE = 300
RETRY_SOON_S = 1  # another server may take at once what this one leaves
RETRY_LATER_S = 5  # an engine that loads or restarts


class RequestError(Exception):
    """A request that is refused for what it says."""

    status: ClassVar[int] = 422
    code: ClassVar[str] = "invalid_request"

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class InvalidJsonError(RequestError):
    """A body that is not JSON in UTF-8."""

    status = 400
    code = "invalid_json"

    def __init__(self, reason: str) -> None:
        super().__init__(f"{_HTTP_MESSAGES['invalid_json']}: {reason}")


class UnknownItemError(RequestError):
    """An item that is not in the catalogue, and no title to score it from."""

    code = "unknown_item"


class TitleRefusedError(RequestError):
    """A title that shows nothing, or that is no text."""


class DuplicateCandidateError(RequestError):
    """A candidate that stands twice in a /rank request."""

    code = "duplicate_candidate"


class ConflictError(RequestError):
    """An event id that is in the log with other content."""

    status = 409
    code = "event_conflict"


class LimitError(RequestError):
    """A list or a title over its limit."""

    code = "limit_exceeded"


class BundleRefusedError(RequestError):
    """A bundle that cannot be served; what is served goes on."""

    code = "bundle_refused"


class BundleTooLargeError(BundleRefusedError):
    """A bundle for which there is not memory enough beside what is loaded."""

    status = 507
    code = "bundle_too_large"


class ChangeRunningError(RequestError):
    """Another change of bundles is under way."""

    status = 409
    code = "change_running"


class BodyTooLargeError(HTTPException):
    """A body over the limit."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, f"the body is longer than {limit} bytes; send fewer items a request")


class BodyTimeoutError(HTTPException):
    """A body that does not arrive. The connection is closed: what still comes on it is no request."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(408, f"the body did not arrive within {limit_s:g} s; send it at once", {"Connection": "close"})


class MediaTypeError(HTTPException):
    """A body that is not declared as plain JSON."""

    def __init__(self, found: str) -> None:
        super().__init__(415, f"{found}; send plain JSON with content-type application/json")


class ClientGoneError(Exception):
    """The client closed the connection before its answer; nobody will read what is returned."""


class BodyCutOffError(ClientGoneError):
    """The client left in the middle of its body: anybody can, at no cost, so it is counted and not logged."""


_HTTP_CODES = {
    400: "invalid_json",
    404: "not_found",
    405: "method_not_allowed",
    408: "body_timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
}
NOT_FOUND = "no such route; /docs lists them"
_HTTP_MESSAGES = {
    "invalid_json": "the body is not readable JSON in UTF-8",
    "not_found": NOT_FOUND,
    "method_not_allowed": "this route does not take that method; /docs lists what it takes",
}


def error_response(
    request_id: str, status: int, code: str, message: str, field: str | None = None, retry_after_s: int | None = None
) -> Response:
    """Return an error in its one shape. Whatever text went into it, it is ASCII-safe and short."""
    body = ErrorResponse(
        error=Problem(code=code, message=_short(message), field=None if field is None else _short(field)),
        request_id=request_id,
    )
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    content = body.model_dump_json(exclude_none=True)
    return Response(content, status_code=status, headers=headers, media_type="application/json")


def install_error_handlers(app: FastAPI, metrics: Metrics, log: structlog.stdlib.BoundLogger) -> None:
    """Answer every exception that a route can raise in the one shape."""

    async def refused_for_content(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return error_response(_id(request), error.status, error.code, error.message, error.field)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        status, code, message, field = _describe(error.errors())
        return error_response(_id(request), status, code, message, field)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = _HTTP_CODES.get(error.status_code, "http_error")
        response = error_response(_id(request), error.status_code, code, _HTTP_MESSAGES.get(code, str(error.detail)))
        response.headers.update(error.headers or {})
        return response

    async def overloaded(request: Request, error: Exception) -> Response:
        status, code, reason, message, retry = _refusal(error)
        metrics.refused(reason)
        if not isinstance(error, BodyCutOffError):
            log.warning("refused", request_id=_id(request), code=code, status=status, detail=str(error))
        return error_response(_id(request), status, code, message, retry_after_s=retry)

    app.add_exception_handler(RequestError, refused_for_content)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    for kind in (QueueFullError, DeadlineExceededError, EngineError, ClientGoneError, LogUnavailableError):
        app.add_exception_handler(kind, overloaded)


def _refusal(error: Exception) -> tuple[int, str, str, str, int | None]:
    """Return status, code, reason for the metric, message and Retry-After of what is no fault of the request."""
    if isinstance(error, QueueFullError):
        message = "too much work is waiting; retry later, with less, or with a longer deadline"
        return 429, "queue_full", "queue_full", message, error.retry_after_s
    if isinstance(error, (DeadlineExceededError, JobDroppedError)):
        message = "the deadline passed before the score was there; allow more time or send fewer items"
        return 504, "deadline_exceeded", "deadline", message, None
    if isinstance(error, EngineUnavailableError):
        return 503, "not_ready", "not_ready", "the engine is not ready; /readyz says when it is", RETRY_LATER_S
    if isinstance(error, LogUnansweredError):
        message = "the disk has not answered; what was sent may be taken or not: send it again, it counts once"
        return 503, "log_unavailable", "log_unavailable", message, RETRY_LATER_S
    if isinstance(error, LogUnavailableError):
        message = "interactions cannot be written to disk now; nothing was taken, send the same event ids again"
        return 503, "log_unavailable", "log_unavailable", message, RETRY_LATER_S
    if isinstance(error, ClientGoneError):
        return 499, "client_gone", "client_gone", "the client closed the connection", None
    return 503, "scoring_failed", "scoring_failed", "the model gave no usable score for this request", RETRY_LATER_S


def _describe(errors: Sequence[Any]) -> tuple[int, str, str, str | None]:
    """Tell the first of pydantic's errors, without repeating what was sent."""
    first = errors[0]
    place, loc = first["loc"][:1], first["loc"][1:]
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == LimitError.code:
        return 422, LimitError.code, message, _path(loc)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return 422, "invalid_request", message + more, _path(loc) or (str(place[0]) if place else None)


def _path(loc: Sequence[int | str]) -> str:
    """Write a location the way a client would: `pairs[2].title`."""
    return "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in loc).removeprefix(".")


def _short(text: str) -> str:
    safe = text.encode("utf-8", "backslashreplace").decode()
    return safe if len(safe) <= MAX_MESSAGE else safe[: MAX_MESSAGE - 3] + "..."


def _id(request: Request) -> str:
    request_id: str = request.state.request_id
    return request_id
