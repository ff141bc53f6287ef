"""What /score and /rank share: the handle, the deadline, the client's leaving, and the one log line of a score."""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import Header, Request, Response
from pydantic import BaseModel

from service.answers import Skipped
from service.batcher import DeadlineExceededError
from service.bundles.handle import BundleHandle
from service.bundles.shadow import sample
from service.collaborators import Collaborators, collaborators_of
from service.engines.protocol import EngineUnavailableError
from service.errors import ClientGoneError
from service.intake import TIMEOUT_HEADER
from service.metrics.registry import bundle_label
from service.metrics.scored import Tally
from service.quality.served import ServedScore
from service.questions import Question
from service.schemas import OnUnknown
from service.scoring import Answer, Timings, score

T = TypeVar("T")

LONG_ANSWER = 100  # results

TimeoutHeader = Annotated[
    int | None,
    Header(
        alias=TIMEOUT_HEADER,
        ge=1,
        le=600_000,
        description="Milliseconds until the answer is of no use; then the work is dropped and 504 returned.",
    ),
]


@dataclass(frozen=True)
class Scored:
    """A scored request: the answers, and what every response tells."""

    answers: list[Answer]
    skipped: list[Skipped]
    request_id: str
    bundle_id: str
    seconds: dict[str, float]
    forgotten: set[str]  # users who were deleted meanwhile

    def common(self) -> dict[str, Any]:
        """Return the fields that both responses have."""
        return {
            "request_id": self.request_id,
            "bundle_id": self.bundle_id,
            "counts": self.answers[0].counts,
            "skipped": self.skipped,
            "timings_ms": {leg: round(1000 * seconds, 3) for leg, seconds in self.seconds.items()},
        }


async def score_for(
    request: Request,
    questions: Sequence[Question],
    on_unknown: OnUnknown,
    timeout_ms: int | None,
    *,
    explain: bool,
) -> Scored:
    """Score a request's questions within its deadline, as long as its client waits.

    Raises:
        ClientGoneError: nobody waits for the answer.
        Others: as `service.scoring.score`.
    """
    service = collaborators_of(request)
    timeout_s = (timeout_ms or service.settings.default_timeout_ms) / 1000
    timings = request.state.timings = Timings()
    live, known = service.interactions.live, service.interactions.deletions_known
    with (
        service.bundles.take(questions[0].user_id if questions else "") as handle,
        service.scoring(questions) as forgotten,
    ):
        health = handle.engine.health()
        if not health.ready:
            raise EngineUnavailableError(f"the engine is {health.state}: {health.detail}")
        try:
            async with asyncio.timeout(timeout_s):
                deadline = time.monotonic() + timeout_s
                work = score(questions, handle, on_unknown, deadline, timings, live, known, explain=explain)
                answers, skipped = await _while_connected(request, work)
        except TimeoutError as error:
            raise DeadlineExceededError(f"not scored within {timeout_s:g} s") from error
        scored = Scored(answers, skipped, request.state.request_id, handle.bundle_id, timings.finish(), forgotten)
        _record(service, request, questions, scored)

        async def rescore(shadow: BundleHandle, until: float) -> tuple[list[Answer], object]:
            with service.scoring(sample(questions)):
                return await score(sample(questions), shadow, "skip", until, Timings(), live, known)

        service.shadow.offer(answers, rescore)
        return scored


async def breathe(results: int) -> None:
    """Let others in between two steps of a long answer, each of which takes some 10 ms for a thousand results."""
    if results > LONG_ANSWER:
        await asyncio.sleep(0)


def answer_with(body: BaseModel, scored: Scored) -> Response:
    """Return a response with its timings in the header too. Serialized here, once: it is already validated."""
    timing = ", ".join(f"{leg};dur={1000 * seconds:.3f}" for leg, seconds in scored.seconds.items())
    # Fields without a value (`parts` without explain) are left out, not null.
    return Response(
        body.model_dump_json(exclude_none=True), media_type="application/json", headers={"Server-Timing": timing}
    )


def remember(request: Request, scored: Scored, results: Sequence[ServedScore]) -> None:
    """Keep what is told to the client, so that outcomes reported later find the scores that they answer."""
    service = collaborators_of(request)
    kept = [one for one in results if one.user_id not in scored.forgotten]
    service.quality.remember(scored.request_id, bundle_label(scored.bundle_id), kept)


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await work, but give it up when the client closes the connection."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return await task
    finally:
        for one in (task, gone):
            one.cancel()
        # Leaving the queue is part of ending: wait for it.
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _record(service: Collaborators, request: Request, questions: Sequence[Question], scored: Scored) -> None:
    """Count and log a score: the one place where either happens."""
    tally = _tally(questions, scored.answers)
    route: str = request.scope["route"].path
    service.metrics.interactions.live(sum(answer.history.source == "live" for answer in scored.answers))
    service.metrics.scored(scored.bundle_id, route, scored.seconds, tally)
    service.log.info(
        "scored",
        request_id=scored.request_id,
        bundle_id=scored.bundle_id,
        route=route,
        key=request.state.key_name,
        candidates=tally.asked,
        skipped=len(scored.skipped),
        cold_users=tally.cold_users,
        cold_items=tally.cold_items,
        unknown_items=tally.unknown_items,
        history_dropped=tally.history_dropped,
        **scored.common()["timings_ms"],
    )


def _tally(questions: Sequence[Question], answers: Sequence[Answer]) -> Tally:
    items = [[item for item in answer.items if item is not None] for answer in answers]
    every = [item for one in items for item in one]
    return Tally(
        asked=sum(len(question.candidates) for question in questions),
        scores_N=np.array([item.score for item in every], np.float32),
        cold_users=len({answer.user_id for answer in answers if answer.cold_user}),
        cold_user_pairs=sum(len(one) for one, answer in zip(items, answers, strict=True) if answer.cold_user),
        cold_items=sum(item.cold_item for item in every),
        unknown_items=sum(item.unknown_item for item in every),
        histories_Q=np.array([answer.history.given for answer in answers], np.int64),
        history_dropped=sum(answer.history.dropped for answer in answers),
    )
