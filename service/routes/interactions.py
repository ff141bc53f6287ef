"""POST /interactions: what was shown, and what came of it."""

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from service.answers import ErrorResponse, InteractionsResponse
from service.collaborators import Collaborators, collaborators_of
from service.errors import ConflictError, RequestError
from service.intake import JsonRoute
from service.interactions.event import Interaction
from service.interactions.log import EventConflictError
from service.routes.documented import ERRORS
from service.schemas import InteractionEvent, InteractionsRequest
from service.settings import DAY_S

AHEAD_S = DAY_S  # a client's clock may be in another time zone by mistake, but not in another year

router = APIRouter(route_class=JsonRoute, tags=["interactions"])


@router.post(
    "/interactions",
    response_model=InteractionsResponse,
    responses={
        **{status: ERRORS[status] for status in (400, 401, 403, 408, 413, 415, 422, 429)},
        409: {"model": ErrorResponse, "description": "An event id is known with other content; nothing was taken."},
        503: {**ERRORS[503], "description": "The log cannot be written; the message says whether nothing was taken."},
    },
)
async def take_interactions(body: InteractionsRequest, request: Request) -> Response:
    """Take impressions and outcomes. What is acknowledged is on disk, and part of the user's next score.

    An outcome names its impression by the answer's `request_id` and `position`, or repeats the impression's event with
    a label. An impression without an outcome within the attribution window counts as a negative.
    """
    service = collaborators_of(request)
    batch = body.interactions
    try:
        _check(batch, service)
        taken = await service.interactions.record([_interaction(one) for one in batch])
    except EventConflictError as error:
        raise ConflictError(str(error), f"interactions[{error.index}]") from error
    except RequestError:
        service.interactions.refuse(len(batch))
        raise
    answer = InteractionsResponse(
        accepted=taken.verdicts.count("accepted"),
        duplicates=taken.verdicts.count("duplicate"),
        forgotten=taken.verdicts.count("forgotten"),
        request_id=request.state.request_id,
    )
    return Response(answer.model_dump_json(), media_type="application/json")


def _check(batch: Sequence[InteractionEvent], service: Collaborators) -> None:
    now = service.interactions.clock.wall()
    for index, one in enumerate(batch):
        field = f"interactions[{index}].timestamp"
        if one.timestamp > now + AHEAD_S:
            raise RequestError("the timestamp is more than a day ahead of the server's clock; set the client's", field)


def _interaction(one: InteractionEvent) -> Interaction:
    return Interaction(one.event_id, one.user_id, one.item_id, one.label, one.timestamp, one.request_id, one.position)
