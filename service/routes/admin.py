"""/admin: which bundles are served, and changes of them while requests go on."""

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from service.answers import BundleState, ChangeState, ErrorResponse, RoleState
from service.bundles.registry import Role
from service.collaborators import Collaborators, collaborators_of
from service.errors import RequestError
from service.intake import JsonRoute, PlainRoute
from service.routes.documented import ERRORS
from service.schemas import BundleRequest

router = APIRouter(prefix="/admin", route_class=PlainRoute, tags=["admin"])
with_body = APIRouter(route_class=JsonRoute)

_CHANGE_ERRORS: dict[int | str, dict[str, Any]] = {
    **{status: ERRORS[status] for status in (401, 403, 429)},
    409: {"model": ErrorResponse, "description": "Another change is under way."},
    422: {"model": ErrorResponse, "description": "The bundle is refused; what is served is untouched."},
}
_LOAD_ERRORS: dict[int | str, dict[str, Any]] = {
    **{status: ERRORS[status] for status in (400, 408, 413, 415)},
    **_CHANGE_ERRORS,
    507: {"model": ErrorResponse, "description": "There is not memory enough for it; what is served is untouched."},
}


@router.get("/bundle", response_model=BundleState, responses={status: ERRORS[status] for status in (401, 403, 429)})
async def bundle_state(request: Request) -> BundleState:
    """Tell which bundle has which role, and how the last change ended or where it stands."""
    return _state(collaborators_of(request))


@with_body.post(
    "/bundle",
    response_model=BundleState,
    responses={202: {"model": BundleState, "description": "Begun."}, **_LOAD_ERRORS},
)
async def change_bundle(body: BundleRequest, request: Request) -> Response:
    """Load a bundle of the bundle folder beside the old and give it a role. It goes on if the client leaves.

    A bundle that is loaded already changes its role and is not loaded again: so a canary becomes current.
    """
    service = collaborators_of(request)
    role = Role(body.role)
    if role is Role.CANARY and body.share is None:
        raise RequestError("a canary needs a share of the users, 0 to 1", "share")
    if role is Role.CURRENT and body.share is not None:
        raise RequestError("the current bundle has no share; leave it out", "share")
    change = service.changes.begin(Path(body.bundle), role, body.share)
    if body.wait:
        try:
            await asyncio.shield(change)
        except asyncio.CancelledError:
            if not change.cancelled():
                raise
            raise RequestError("the service is stopping; the change was given up") from None
    state = _state(service)
    return Response(state.model_dump_json(), status_code=200 if body.wait else 202, media_type="application/json")


@router.delete("/bundle/{role}", response_model=BundleState, responses=_CHANGE_ERRORS)
async def end_role(role: Role, request: Request) -> BundleState:
    """End the canary or the shadow; requests that hold its bundle end with it."""
    service = collaborators_of(request)
    await service.changes.end(role)
    return _state(service)


router.include_router(with_body)


def _state(service: Collaborators) -> BundleState:
    last = service.changes.last
    return BundleState(
        roles=[
            RoleState(
                role=role.value,
                bundle_id=seat.handle.bundle_id,
                merged_id=seat.handle.bundle.manifest.backbone.merged_id,
                folder=str(seat.handle.bundle.folder),
                share=None if role is Role.CURRENT else service.bundles.share(role),
                state=seat.handle.engine.health().state,
                requests=seat.holders,
            )
            for role, seat in service.bundles.roles.items()
        ],
        draining=service.changes.draining,
        change=None
        if last is None
        else ChangeState(
            role=last.role.value,
            bundle=last.bundle,
            began=last.began.isoformat(),
            step=last.step,
            outcome=last.outcome or "running",
            reason=last.reason,
        ),
    )
