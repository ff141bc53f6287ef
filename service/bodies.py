"""Bodies of requests: read whole, their values counted before they are parsed, long ones parsed beside the loop."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.types import Receive

from service.admission import QueueFullError
from service.errors import (
    RETRY_SOON_S,
    BodyCutOffError,
    BodyTimeoutError,
    BodyTooLargeError,
    InvalidJsonError,
    LimitError,
)
from service.schemas import RequestBody
from service.settings import Settings

Body = TypeVar("Body", bound=RequestBody)

# A shorter body is parsed at once: that takes a few milliseconds at most, and a thread costs 0.1 ms.
INLINE_BYTES = 4096
# Long bodies that may wait to be parsed. More than one at a time would be no faster: Python's lock is held.
MOST_WAITING = 256
MAX_DIGITS = 1000  # no id and no number that a route takes is longer
_QUOTE, _COMMA, _LIST, _OBJECT = b'",[{'


class Bodies:
    """Reads and parses bodies within the limits of the settings."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._permit = asyncio.Semaphore(1)
        self._waiting = 0

    async def read(self, request: Request) -> bytes:
        """Return a request's body.

        Raises:
            BodyTooLargeError, BodyTimeoutError: the body is too long, or does not arrive in time.
            BodyCutOffError: the client left before its end.
        """
        limit, limit_s = self._settings.max_body, self._settings.body_timeout_s
        declared = request.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
            raise BodyTooLargeError(limit)
        try:
            async with asyncio.timeout(limit_s):
                return await _read(request.receive, limit)
        except BodyCutOffError:
            if request.scope["state"].get("invalid_http"):  # and the connection has said so
                raise InvalidJsonError("the body breaks off") from None
            raise
        except TimeoutError as error:
            raise BodyTimeoutError(limit_s) from error

    async def parse(self, body: bytes, model: type[Body]) -> Body:
        """Return a body as its model. A long one is parsed in a thread, one at a time.

        Raises:
            InvalidJsonError, LimitError, RequestValidationError: the body is not what the route takes.
            QueueFullError: too many long bodies wait.
        """
        if len(body) <= INLINE_BYTES:
            return parse(body, model, self._settings)
        if self._waiting >= MOST_WAITING:
            raise QueueFullError(f"{self._waiting} bodies wait to be parsed", RETRY_SOON_S)
        self._waiting += 1
        try:
            async with self._permit:
                return await asyncio.to_thread(parse, body, model, self._settings)
        finally:
            self._waiting -= 1


async def _read(receive: Receive, limit: int) -> bytes:
    parts, seen = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BodyCutOffError
        parts.append(message.get("body", b""))
        seen += len(parts[-1])
        if seen > limit:
            raise BodyTooLargeError(limit)
        if not message.get("more_body", False):
            return b"".join(parts)


def parse(body: bytes, model: type[Body], settings: Settings) -> Body:
    """Return a body as its model, whose validators read the limits of the settings.

    Raises:
        InvalidJsonError: the body is not JSON in UTF-8.
        LimitError: it has more values than a body within the limits.
        RequestValidationError: it is not what the model says.
    """
    if not body:
        _refuse([{"type": "missing", "loc": (), "msg": "Field required"}])
    most = model.most_values(settings)
    commas, opening = separators(body, most)
    if commas > most:
        raise LimitError(f"the body has more than {most} values; send fewer a request")
    if opening > most:
        raise InvalidJsonError("nested too deep")
    try:
        value = json.loads(body.decode("utf-8-sig"), parse_int=_short_int)
    except json.JSONDecodeError as error:
        raise InvalidJsonError(error.msg) from error
    except UnicodeDecodeError as error:
        raise InvalidJsonError(f"not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise InvalidJsonError("nested too deep") from error
    try:
        return model.model_validate(value, context=settings)
    except ValidationError as error:
        _refuse(error.errors(include_url=False, include_input=False))


def separators(body: bytes, enough: int) -> tuple[int, int]:
    """Return how many commas and how many opening brackets a JSON text has, as a bound of its values and lists.

    Those in strings count only where neither number exceeds `enough`. Nothing is built: 1 MB takes a few milliseconds.
    """
    commas, opening = body.count(b","), body.count(b"[") + body.count(b"{")
    if max(commas, opening) <= enough:
        return commas, opening
    text_N = np.frombuffer(body.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    outside_N = text_N[~np.bitwise_xor.accumulate(text_N == _QUOTE)]
    return int((outside_N == _COMMA).sum()), int(((outside_N == _LIST) | (outside_N == _OBJECT)).sum())


def _short_int(digits: str) -> int:
    """Read a whole number. The time grows with the square of its digits; Python's own limit is 4,300 of them."""
    if len(digits) > MAX_DIGITS:
        raise InvalidJsonError(f"a number has more than {MAX_DIGITS} digits")
    return int(digits)


def _refuse(errors: Sequence[Mapping[str, Any]]) -> NoReturn:
    raise RequestValidationError([{**error, "loc": ("body", *error["loc"])} for error in errors])
