"""DELETE /users/{user_id}: forget a user."""

from urllib.parse import unquote_to_bytes

from fastapi import APIRouter, Request, Response

from models.ids import IdError, canonical_id
from service.answers import DeletedResponse, ErrorResponse
from service.collaborators import collaborators_of
from service.errors import RequestError
from service.routes.documented import ERRORS

router = APIRouter(tags=["admin"])


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
    _require_utf8(request)
    try:
        user_id = canonical_id(user_id)
    except IdError as error:
        raise RequestError(str(error), "user_id") from error
    deleted_at = await service.interactions.delete(user_id)
    answer = DeletedResponse(user_id=user_id, deleted_at=deleted_at, request_id=request.state.request_id)
    return Response(answer.model_dump_json(), media_type="application/json")


def _require_utf8(request: Request) -> None:
    """Refuse a path in another encoding: it would be read as another user, and the one meant would stay."""
    try:
        unquote_to_bytes(request.scope["raw_path"]).decode()
    except UnicodeDecodeError as error:
        raise RequestError("the path is not UTF-8; percent-encode the id's UTF-8 bytes", "user_id") from error
