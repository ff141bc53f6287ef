"""POST /rank: many candidates for one user, best first."""

from fastapi import APIRouter, Request, Response

from service.answers import RankedItem, RankResponse
from service.intake import JsonRoute
from service.quality.served import ServedScore
from service.questions import questions_of_rank
from service.routes.documented import ERRORS
from service.routes.scored import TimeoutHeader, answer_with, breathe, remember, score_for
from service.schemas import RankRequest

router = APIRouter(route_class=JsonRoute, tags=["scoring"])


@router.post("/rank", response_model=RankResponse, responses=ERRORS)
async def rank_candidates(body: RankRequest, request: Request, timeout_ms: TimeoutHeader = None) -> Response:
    """Rank candidates for one user by score, best first; equal scores keep the request's order."""
    questions = questions_of_rank(body)
    scored = await score_for(request, questions, body.on_unknown, timeout_ms, explain=body.explain)
    [answer] = scored.answers
    await breathe(len(answer.items))
    best_first = answer.best_first()[: body.top_k]
    results = [RankedItem(**item.fields(), rank=rank) for rank, item in enumerate(best_first, start=1)]
    remember(request, scored, [ServedScore(one.rank, answer.user_id, one.item_id, one.score) for one in results])
    await breathe(len(results))
    response = RankResponse(
        user_id=answer.user_id,
        cold_user=answer.cold_user,
        history=answer.history,
        results=results,
        **scored.common(),
    )
    return answer_with(response, scored)
