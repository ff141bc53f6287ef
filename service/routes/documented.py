"""The errors that routes document, each status once."""

from typing import Any

from service.answers import ErrorResponse

_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
_CHALLENGE = {"WWW-Authenticate": {"description": "How to send a key.", "schema": {"type": "string"}}}

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The body is not JSON."},
    401: {"model": ErrorResponse, "description": "No key, or one that is not known.", "headers": _CHALLENGE},
    403: {"model": ErrorResponse, "description": "The key does not open this route."},
    408: {"model": ErrorResponse, "description": "The body did not arrive in time."},
    413: {"model": ErrorResponse, "description": "The body is too long."},
    415: {"model": ErrorResponse, "description": "The body is not declared as plain JSON."},
    422: {"model": ErrorResponse, "description": "The body says something that cannot be scored; `field` says where."},
    429: {
        "model": ErrorResponse,
        "description": "Too much work is waiting, or too many requests of one client.",
        "headers": _RETRY_AFTER,
    },
    503: {"model": ErrorResponse, "description": "The engine is not ready, or failed.", "headers": _RETRY_AFTER},
    504: {"model": ErrorResponse, "description": "The deadline passed."},
}
