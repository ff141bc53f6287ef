"""What a request asks, in one form for both routes, and what the lookup found of it.

A question is one user with one history and any number of candidates; the pairs of a /score request that share both
are one question. Every item remembers where in the request it stood, so that an error can name the place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.assembly import history_window
from models.features import HistoryItem, ItemFeatures
from models.template import Template
from service.answers import HistorySource, Skipped
from service.errors import DuplicateCandidateError, LimitError, UnknownItemError
from service.features.protocol import Features, Query
from service.interactions.live import LiveUser
from service.schemas import ItemRef, OnUnknown, RankRequest, ScoreRequest
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class Asked:
    """An item as the client named it, and where."""

    item_id: str
    title: str | None
    field: str


@dataclass(frozen=True, slots=True)
class Question:
    """One user, one history, the candidates to score behind it. `history` is None for the bundle's stored one."""

    user_id: str
    history: tuple[Asked, ...] | None
    candidates: tuple[Asked, ...]


@dataclass(frozen=True, slots=True)
class PromptItem:
    """An item that will stand in the prompt. `features` is None until its title is distilled.

    A candidate's are whole `ItemFeatures`; of an item in the history less may be known.
    """

    asked: Asked
    features: HistoryItem | None
    in_catalogue: bool
    title_ignored: bool


@dataclass(frozen=True, slots=True)
class Resolved:
    """A question with what is known: what stands in its prompt, and what was skipped."""

    question: Question
    source: HistorySource
    total: int  # liked items in all, known ones or not
    history_ids: frozenset[str]
    window: tuple[PromptItem, ...]
    candidates: tuple[PromptItem | None, ...]  # None: skipped


def questions_of_rank(request: RankRequest, settings: Settings) -> list[Question]:
    """Return a /rank request's one question.

    Raises:
        LimitError: a list or a title is over its limit.
        DuplicateCandidateError: a candidate stands twice.
    """
    _check_length("candidates", len(request.candidates), settings.max_candidates)
    first: dict[str, int] = {}
    for index, one in enumerate(request.candidates):
        if (before := first.setdefault(one.item_id, index)) != index:
            raise DuplicateCandidateError(
                f"candidate {one.item_id[:40]!r} stands at {before} and at {index}; send it once",
                f"candidates[{index}]",
            )
    history = _history("history", request.history, settings)
    return [Question(request.user_id, history, _asked("candidates", request.candidates, settings))]


def questions_of_score(request: ScoreRequest, settings: Settings) -> tuple[list[Question], list[tuple[int, int]]]:
    """Return a /score request's questions, and for each pair its (question, candidate) place.

    Raises:
        LimitError: a list or a title is over its limit.
    """
    _check_length("pairs", len(request.pairs), settings.max_pairs)
    # A history is told apart by its items, not by where it stood.
    numbers: dict[tuple[str, tuple[tuple[str, str | None], ...] | None], int] = {}
    heads: list[tuple[str, tuple[Asked, ...] | None]] = []
    candidates: list[list[Asked]] = []
    places: list[tuple[int, int]] = []
    for index, pair in enumerate(request.pairs):
        told = None if pair.history is None else tuple((one.item_id, one.title) for one in pair.history)
        number = numbers.setdefault((pair.user_id, told), len(heads))
        if number == len(heads):
            heads.append((pair.user_id, _history(f"pairs[{index}].history", pair.history, settings)))
            candidates.append([])
        places.append((number, len(candidates[number])))
        _check_title(f"pairs[{index}].title", pair.title, settings)
        candidates[number].append(Asked(pair.item_id, pair.title, f"pairs[{index}]"))
    questions = [Question(*head, tuple(asked)) for head, asked in zip(heads, candidates, strict=True)]
    return questions, places


def query(questions: Sequence[Question], template: Template, live: Mapping[str, LiveUser] | None = None) -> Query:
    """Return what to look up: the users, the candidates, and those history entries that the prompt shows.

    `live` is what this server's own log knows of the users.
    """
    items = {one.item_id for question in questions for one in question.candidates}
    if live and (shown := template.config.max_history):
        stored = {question.user_id for question in questions if question.history is None}
        # No like before a user's last `max_history` can be in the window, whatever else is known of the user.
        items.update(like.item_id for one in stored & live.keys() for like in live[one].likes[-shown:])
    for question in questions:
        if question.history is not None:
            items.update(one.item_id for one in _window(question.history, template))
    return Query(
        user_ids=frozenset(question.user_id for question in questions),
        item_ids=frozenset(items),
        histories_of=frozenset(question.user_id for question in questions if question.history is None),
        counts_of=frozenset(one.item_id for question in questions for one in question.candidates),
    )


def resolve(
    questions: Sequence[Question],
    found: Features,
    template: Template,
    on_unknown: OnUnknown,
    live: frozenset[str] = frozenset(),
) -> tuple[list[Resolved], list[Skipped]]:
    """Join questions with what was found; the histories of users in `live` have live likes in them.

    Raises:
        UnknownItemError: an item is not in the catalogue and has no title, and `on_unknown` is "error".
    """
    skipped: list[Skipped] = []
    resolved = [_resolve(question, found, template, on_unknown, skipped, live) for question in questions]
    return resolved, skipped


def _resolve(
    question: Question,
    found: Features,
    template: Template,
    on_unknown: OnUnknown,
    skipped: list[Skipped],
    live: frozenset[str],
) -> Resolved:
    user = found.users.get(question.user_id)
    source: HistorySource
    if question.history is not None:
        source, total = "request", len(question.history)
        told = _window(question.history, template)
        history_ids = frozenset(one.item_id for one in question.history)
        window = [_find(one, found.items, on_unknown, skipped) for one in told]
    else:
        total = 0 if user is None else user.history_total
        source = "none" if not total else "live" if question.user_id in live else "bundle"
        stored = user.history if user is not None else ()
        history_ids = frozenset(stored)
        # The client did not send these, so an item that left the catalogue is dropped and counted, not an error.
        window = [
            PromptItem(Asked(one, None, "history"), item, in_catalogue=True, title_ignored=False)
            for one in history_window(stored, total, template)
            if (item := found.history_item(one)) is not None
        ]
    candidates = tuple(_find(one, found.items, on_unknown, skipped) for one in question.candidates)
    known = tuple(one for one in window if one is not None)
    return Resolved(question, source, total, history_ids, known, candidates)


def _find(
    asked: Asked, items: Mapping[str, ItemFeatures], on_unknown: OnUnknown, skipped: list[Skipped]
) -> PromptItem | None:
    known = items.get(asked.item_id)
    if known is not None:
        # The vectors were learned with the catalogue's title; another text beside them is nothing the LM has seen.
        ignored = asked.title is not None and asked.title != known.title
        return PromptItem(asked, known, in_catalogue=True, title_ignored=ignored)
    if asked.title is not None:
        return PromptItem(asked, None, in_catalogue=False, title_ignored=False)
    if on_unknown == "skip":
        skipped.append(Skipped(field=asked.field, item_id=asked.item_id))
        return None
    raise UnknownItemError(
        f"item {asked.item_id[:40]!r} is not in the catalogue; send its title, or set on_unknown to skip", asked.field
    )


def _window(history: Sequence[Asked], template: Template) -> Sequence[Asked]:
    shown = len(history_window([one.item_id for one in history], len(history), template))
    return history[len(history) - shown :]


def _history(field: str, items: Sequence[ItemRef] | None, settings: Settings) -> tuple[Asked, ...] | None:
    if items is None:
        return None
    _check_length(field, len(items), settings.max_history)
    return _asked(field, items, settings)


def _asked(field: str, items: Sequence[ItemRef], settings: Settings) -> tuple[Asked, ...]:
    for index, one in enumerate(items):
        _check_title(f"{field}[{index}].title", one.title, settings)
    return tuple(Asked(one.item_id, one.title, f"{field}[{index}]") for index, one in enumerate(items))


def _check_length(field: str, length: int, limit: int) -> None:
    if length > limit:
        raise LimitError(f"{length} entries; send at most {limit}", field)


def _check_title(field: str, title: str | None, settings: Settings) -> None:
    if title is not None and len(title) > settings.max_title:
        raise LimitError(f"a title of {len(title)} characters; send at most {settings.max_title}", field)
