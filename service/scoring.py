"""A request's way: look up, assemble, batch, forward, fuse.

Shapes: K candidates of a group, N titles, D = d_L.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from models.assembly import UNKNOWN_AGES, AssembledUser, Assembler, known_pairs, like_ages
from models.features import NO_COUNTS, Floats, HistoryItem, ItemFeatures, Outcome
from models.fusion import Counts, Fusion, probabilities
from models.packs import ScoringGroup
from service.answers import CountsSource, HistoryReport, ScoredItem, Skipped
from service.batcher import Waited
from service.bundles.handle import BundleHandle
from service.engines.protocol import EngineUnavailableError
from service.features.protocol import Features
from service.interactions.counts import Counted, larger
from service.interactions.histories import NOBODY, MergedUser, merge_all
from service.interactions.live import Ends, LiveUser
from service.questions import PromptItem, Question, Resolved, query, resolve
from service.schemas import OnUnknown

# A log that never heard of the deletions of its fleet, and no Redis to ask: the bundle may hold users who were deleted.
DELETIONS_UNKNOWN = "who was deleted is not known: Redis has not answered since this server's log was begun"
LiveLookup = Callable[[frozenset[str], Ends], Awaitable[Mapping[str, LiveUser]]]


async def nothing_live(user_ids: frozenset[str], ends: Ends) -> Mapping[str, LiveUser]:
    """Know nothing of any user beyond the bundle."""
    return {}


class DeletionsUnknownError(EngineUnavailableError):
    """Whether users were deleted is not known, so no bundle may be used for any; it may be known later."""


@dataclass
class Timings:
    """Seconds of each leg of one request. `spans` are the legs' parts: name, beginning and end, monotonic seconds."""

    started: float = field(default_factory=time.monotonic)
    legs: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("lookup", "assemble", "queue", "forward"), 0.0)
    )
    spans: list[tuple[str, float, float]] = field(default_factory=list)

    @contextmanager
    def leg(self, name: str) -> Iterator[None]:
        """Add what happens inside to a leg."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._add(name, started, time.monotonic())

    def add(self, waited: Waited) -> None:
        """Add what one pass through the batcher took, which has just ended."""
        ended = time.monotonic()
        dispatched = ended - waited.forward_s
        self._add("queue", dispatched - waited.queue_s, dispatched)
        self._add("forward", dispatched, ended)

    @property
    def engine_worked(self) -> bool:
        """Whether the engine has computed something for this request."""
        return self.legs["forward"] > 0

    def finish(self) -> dict[str, float]:
        """Return every leg and the total."""
        return {**self.legs, "total": time.monotonic() - self.started}

    def _add(self, leg: str, began: float, ended: float) -> None:
        self.legs[leg] += ended - began
        self.spans.append((leg, began, ended))


@dataclass(frozen=True, slots=True)
class Answer:
    """One question's scores; None stands for a candidate that was skipped.

    `logits` are the scores' own: they tell candidates apart whose probabilities round to the same number.
    """

    user_id: str
    cold_user: bool
    history: HistoryReport
    counts: CountsSource
    items: tuple[ScoredItem | None, ...]
    logits: tuple[float, ...]  # of the items that are not None, in order

    def best_first(self) -> list[ScoredItem]:
        """Return the items in the order of their logits; equal ones keep the request's order."""
        scored = (item for item in self.items if item is not None)
        pairs = sorted(zip(self.logits, scored, strict=True), key=lambda pair: -pair[0])
        return [item for _, item in pairs]


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A resolved question, assembled; `group` is None if every candidate was skipped."""

    resolved: Resolved
    user: AssembledUser
    counts: Counts  # the bundle's, of the user
    items: tuple[ItemFeatures, ...]  # those in the group
    group: ScoringGroup | None
    titles_cut: tuple[int, ...]  # of each candidate in the group


@dataclass(frozen=True, slots=True)
class _Score:
    """A candidate's raw score, score and its logit, what each part adds to that, and tokens cut off its title."""

    raw: float
    score: float
    logit: float
    parts: dict[str, float] | None
    title_cut: int


async def score(
    questions: Sequence[Question],
    handle: BundleHandle,
    on_unknown: OnUnknown,
    deadline: float,
    timings: Timings,
    live: LiveLookup = nothing_live,
    deletions_known: Callable[[], bool] = lambda: True,
    *,
    explain: bool = False,
) -> tuple[list[Answer], list[Skipped]]:
    """Score every candidate of every question with one bundle; `deadline` is `time.monotonic()` seconds.

    `live` returns what this server's own log knows of users. `explain` adds the parts of its score to each item.
    `deletions_known` says whether the log has heard of the deletions at other servers.

    Raises:
        UnknownItemError: an item is not in the catalogue and has no title.
        DeletionsUnknownError: nobody tells which users were deleted.
        QueueFullError, DeadlineExceededError, EngineError: no score, and no fault of the request.
    """
    template = handle.assembler.template
    handle.batcher.check(*_size(questions), deadline)
    with timings.leg("lookup"):
        found, merged, counted = await _look_up(questions, handle, live)
        if not found.tells_deletions and not deletions_known():
            raise DeletionsUnknownError(DELETIONS_UNKNOWN)
    resolved, skipped = resolve(questions, found, template, on_unknown, merged)
    resolved = await _distil_unknown(resolved, handle, deadline, timings)
    with timings.leg("assemble"):
        prompts = await _assemble(resolved, merged, handle, live=counted.live)
    logits = await _compute([one.group for one in prompts if one.group is not None], handle, deadline, timings)
    return _answers(prompts, logits, counted, handle.fusion, explain=explain), skipped


async def _look_up(
    questions: Sequence[Question], handle: BundleHandle, live: LiveLookup
) -> tuple[Features, dict[str, MergedUser], Counted]:
    """Return what was found; the merged users, with live likes and outcomes; the live counts."""
    # The log first: its likes are looked up in the same round trip as everything else.
    tables, template = handle.tables, handle.assembler.template
    logged = await live(frozenset(question.user_id for question in questions), tables.history_end)
    asked = query(questions, template, logged, tables.has_item)
    found = await handle.store.look_up(handle.bundle_id, asked)
    # This server's log may still count a user whom another server has deleted.
    forgotten = {
        one
        for one, told in found.live.items()
        if told.deleted_at is not None and (logged.get(one, NOBODY).deleted_at or 0.0) < told.deleted_at
    }
    own = handle.counts.of(asked.user_ids - forgotten, asked.counts_of)
    elsewhere = {
        one: counts.positives - own.users.get(one, NO_COUNTS).positives
        for one, counts in found.counted.users.items()
        if own.live or one not in logged
    }
    merged = await merge_all(
        *(asked.user_ids, found.users, found.live, logged, tables.has_item, elsewhere),
        window=template.config.max_history,
    )
    return found, merged, larger(own, found.counted)


def _size(questions: Sequence[Question]) -> tuple[int, int]:
    """Return how many groups and how many candidates questions make."""
    return len(questions), sum(len(question.candidates) for question in questions)


async def _distil_unknown(
    resolved: Sequence[Resolved], handle: BundleHandle, deadline: float, timings: Timings
) -> list[Resolved]:
    """Give every item from outside the catalogue the vectors that its title distils to."""
    template = handle.assembler.template
    unknown = [
        item.asked
        for one in resolved
        for item in (*one.window, *one.candidates)
        if item is not None and item.features is None
    ]
    titles = list(dict.fromkeys(asked.title for asked in unknown if asked.title is not None))
    if not titles:
        return list(resolved)
    with timings.leg("assemble"):
        prompts = await asyncio.to_thread(lambda: [template.distil(handle.assembler.title(title)) for title in titles])
    then = _size([one.question for one in resolved])
    vectors_ND, waited = await handle.batcher.distil(prompts, deadline, then=then)
    timings.add(waited)
    semantic = dict(zip(titles, vectors_ND, strict=True))

    def filled(item: PromptItem) -> PromptItem:
        title = item.asked.title
        if item.features is not None or title is None:
            return item
        return replace(item, features=handle.tables.unseen_item(item.asked.item_id, title, semantic[title]))

    return [
        replace(
            one,
            window=tuple(filled(item) for item in one.window),
            candidates=tuple(None if item is None else filled(item) for item in one.candidates),
        )
        for one in resolved
    ]


async def _assemble(
    resolved: Sequence[Resolved], merged: Mapping[str, MergedUser], handle: BundleHandle, *, live: bool
) -> list[_Prompt]:
    """Tokenize and assemble in a thread, so that the event loop stays free. `live` also updates the live vectors."""

    def assemble() -> list[_Prompt]:
        updates = _Updates(merged, handle) if live else None
        return [_assemble_one(one, merged, updates, handle.assembler) for one in resolved]

    return await asyncio.to_thread(assemble)


def _outcomes(user_id: str, user: MergedUser, handle: BundleHandle) -> list[Outcome]:
    """Return the bundle's outcomes of a user, then the live outcomes after the end of the bundle's own counts."""
    stored = () if user.deleted else handle.tables.stored_outcomes(user_id)
    since = (one for one in user.outcomes if one.shown > handle.counts.until)
    return [*stored, *(Outcome(one.item_id, one.positive, one.shown) for one in since)]


class _Updates:
    """Updates users' live vectors with their outcomes.

    A trained user's live vector does not depend on the history of a question, so it is computed once a request.
    """

    def __init__(self, merged: Mapping[str, MergedUser], handle: BundleHandle) -> None:
        self._assembler, self.at = handle.assembler, time.time()  # `at` is the moment of the scores, UTC seconds
        self._evidence = {
            one: handle.tables.evidence(one, _outcomes(one, user, handle)) for one, user in merged.items()
        }
        self._trained: dict[str, Floats] = {}

    def of(self, user_id: str, user: AssembledUser) -> AssembledUser:
        """Return the user of one question with an updated live vector."""
        if user_id in self._trained:
            return replace(user, live_C=self._trained[user_id])
        updated = self._assembler.updated(user, self._evidence[user_id], self.at)
        if not user.cold:
            self._trained[user_id] = updated.live_C
        return updated


def _assemble_one(
    resolved: Resolved, merged: Mapping[str, MergedUser], updates: _Updates | None, assembler: Assembler
) -> _Prompt:
    user_id = resolved.question.user_id
    known = merged[user_id].features
    ages_L = UNKNOWN_AGES  # a request's history has no times, and without live counts newer likes may be missing
    if updates is not None and resolved.source != "request":
        ages_L = like_ages(merged[user_id].like_times, updates.at, assembler.template)
    user = assembler.user(known, [_known(item) for item in resolved.window], resolved.total, ages_L)
    if updates is not None:
        user = updates.of(user_id, user)
    items = [_candidate(item) for item in resolved.candidates if item is not None]
    return _Prompt(
        resolved=resolved,
        user=user,
        counts=NO_COUNTS if known is None else known.counts,
        items=tuple(items),
        group=assembler.group(user, items) if items else None,
        titles_cut=tuple(assembler.title(item.title).cut for item in items),
    )


def _known(item: PromptItem) -> HistoryItem:
    assert item.features is not None, "unknown items are distilled before they are assembled"
    return item.features


def _candidate(item: PromptItem) -> ItemFeatures:
    assert isinstance(item.features, ItemFeatures), "a candidate needs the vectors behind its slots"
    return item.features


async def _compute(
    groups: Sequence[ScoringGroup], handle: BundleHandle, deadline: float, timings: Timings
) -> list[Floats]:
    if not groups:
        return []
    logits, waited = await handle.batcher.score(
        groups, deadline, admitted=timings.engine_worked, bundle_id=handle.bundle_id
    )
    timings.add(waited)
    return logits


def _answers(
    prompts: Sequence[_Prompt], logits: Sequence[Floats], counted: Counted, fusion: Fusion, *, explain: bool
) -> list[Answer]:
    """Turn logits into scores, and put each score in the place of its candidate."""
    groups = iter(logits)
    answers = []
    for prompt in prompts:
        scores: list[_Score] = []
        if prompt.group is not None:
            scores = _scores(prompt, prompt.group, next(groups), counted, fusion, explain=explain)
        answers.append(_answer(prompt, scores, counted))
    return answers


def _scores(
    prompt: _Prompt, group: ScoringGroup, logits_K: Floats, counted: Counted, fusion: Fusion, *, explain: bool
) -> list[_Score]:
    user = prompt.counts + counted.users.get(prompt.resolved.question.user_id, NO_COUNTS)
    items = [(one.counts + counted.items.get(one.item_id, NO_COUNTS), not one.trained) for one in prompt.items]
    parts = fusion.parts(known_pairs(logits_K, group, (user, prompt.user), items, live=counted.live))
    fused_K = np.sum([*parts.values()], axis=0)
    rows = zip(
        probabilities(logits_K).tolist(),
        probabilities(fused_K).tolist(),
        fused_K.tolist(),
        prompt.titles_cut,
        strict=True,
    )
    columns = {name: values.tolist() for name, values in parts.items()} if explain else {}
    return [
        _Score(raw, score, logit, {name: values[k] for name, values in columns.items()} if explain else None, cut)
        for k, (raw, score, logit, cut) in enumerate(rows)
    ]


def _answer(prompt: _Prompt, scores: Sequence[_Score], counted: Counted) -> Answer:
    resolved, user = prompt.resolved, prompt.user
    left = iter(scores)
    items = tuple(None if item is None else _scored(item, resolved, next(left)) for item in resolved.candidates)
    history = HistoryReport(
        source=resolved.source,
        given=user.history.given,
        used=user.history.used,
        dropped=user.history.dropped,
        titles_cut=user.titles_cut,
        titles_ignored=sum(item.title_ignored for item in resolved.window),
        titles_cleaned=sum(item.asked.cleaned and not item.in_catalogue for item in resolved.window) or None,
    )
    source: CountsSource = "live" if counted.live else "bundle"
    logits = tuple(one.logit for one in scores)
    return Answer(resolved.question.user_id, user.cold, history, source, items, logits)


def _scored(item: PromptItem, resolved: Resolved, scored: _Score) -> ScoredItem:
    features = _candidate(item)
    return ScoredItem(
        item_id=item.asked.item_id,
        score=scored.score,
        raw_score=scored.raw,
        cold_item=not features.trained,
        unknown_item=not item.in_catalogue,
        in_history=item.asked.item_id in resolved.history_ids,
        title_ignored=item.title_ignored,
        title_tokens_cut=scored.title_cut,
        title=item.asked.title if item.asked.cleaned and not item.in_catalogue else None,
        parts=scored.parts,
    )
