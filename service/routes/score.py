"""POST /score: each pair for itself."""

import asyncio

from fastapi import APIRouter, Request, Response

from service.answers import ScoredPair, ScoreResponse
from service.intake import JsonRoute
from service.quality.served import ServedScore
from service.questions import questions_of_score
from service.routes.documented import ERRORS
from service.routes.scored import TimeoutHeader, answer_with, breathe, remember, score_for
from service.schemas import ScoreRequest

# Entries of histories that are sorted out at once; each takes some microseconds.
INLINE_ENTRIES = 1000

router = APIRouter(route_class=JsonRoute, tags=["scoring"])


@router.post("/score", response_model=ScoreResponse, responses=ERRORS)
async def score_pairs(body: ScoreRequest, request: Request, timeout_ms: TimeoutHeader = None) -> Response:
    """Score pairs of a user and an item; results stand in the request's order.

    Pairs of one user with the same history share one pass over it.
    """
    if sum(len(pair.history or ()) for pair in body.pairs) > INLINE_ENTRIES:
        questions, places = await asyncio.to_thread(questions_of_score, body)
    else:
        questions, places = questions_of_score(body)
    scored = await score_for(request, questions, body.on_unknown, timeout_ms, explain=body.explain)
    await breathe(len(places))
    results = []
    for index, (question, candidate) in enumerate(places):
        answer = scored.answers[question]
        item = answer.items[candidate]
        if item is not None:
            results.append(
                ScoredPair(
                    **item.fields(),
                    index=index,
                    user_id=answer.user_id,
                    cold_user=answer.cold_user,
                    history=answer.history,
                )
            )
    remember(request, scored, [ServedScore(one.index, one.user_id, one.item_id, one.score) for one in results])
    await breathe(len(results))
    return answer_with(ScoreResponse(results=results, **scored.common()), scored)
