"""The errors that routes document, each status once."""

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from service.access.gate import Need, need_of
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

_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, or an admin key."},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
}


def document_keys(app: FastAPI) -> None:
    """Add to the OpenAPI document how a key is sent, to each route that asks for one."""
    describe = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        schema = describe()
        schema["components"]["securitySchemes"] = _SCHEMES
        for route in app.routes:
            if isinstance(route, APIRoute) and route.include_in_schema:
                for method in route.methods:
                    if need_of(route, method) is not Need.NOTHING:
                        operation = schema["paths"][route.path_format][method.lower()]
                        operation["security"] = [{name: []} for name in _SCHEMES]
        return schema

    app.openapi = described  # type: ignore[method-assign]  # FastAPI's own way to extend the document
