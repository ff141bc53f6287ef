"""DELETE /users/{user_id}: forget a user."""

import re
from urllib.parse import unquote_to_bytes

from fastapi import APIRouter, Request, Response

from models.ids import IdError, canonical_id
from service.answers import DeletedResponse, ErrorResponse
from service.collaborators import collaborators_of
from service.errors import RequestError
from service.intake import PlainRoute
from service.routes.documented import ERRORS

_STRAY_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")

router = APIRouter(route_class=PlainRoute, tags=["admin"])


@router.delete(
    "/users/{user_id:path}",
    response_model=DeletedResponse,
    responses={
        **{status: ERRORS[status] for status in (401, 403, 422, 429)},
        404: {"model": ErrorResponse, "description": "The path names no user, or one with a line break."},
        503: {**ERRORS[503], "description": "The log cannot be written; delete the user again."},
    },
)
async def delete_user(user_id: str, request: Request) -> Response:
    """Forget a user: interactions, counts, history and vector. A tombstone stays, which training honours.

    Asked again, everything up to the later moment is forgotten.
    """
    service = collaborators_of(request)
    _require_plain(request.scope["raw_path"])
    try:
        user_id = canonical_id(user_id)
    except IdError as error:
        raise RequestError(str(error), "user_id") from error
    deleted_at = await service.interactions.delete(user_id)
    answer = DeletedResponse(user_id=user_id, deleted_at=deleted_at, request_id=request.state.request_id)
    return Response(answer.model_dump_json(), media_type="application/json")


def _require_plain(raw_path: bytes) -> None:
    """Refuse a path that could mean another user than the one it would delete for good."""
    raw_id = raw_path.removeprefix(b"/users/")
    if b"/" in raw_id:
        raise RequestError("the id has a slash; percent-encode it as %2F if it belongs to the id", "user_id")
    if _STRAY_PERCENT.search(raw_id):
        raise RequestError("the id has a % without two hexadecimal digits; percent-encode it as %25", "user_id")
    try:
        unquote_to_bytes(raw_id).decode()
    except UnicodeDecodeError as error:
        raise RequestError("the path is not UTF-8; percent-encode the id's UTF-8 bytes", "user_id") from error
