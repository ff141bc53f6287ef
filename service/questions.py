"""What a request asks, in one form for both routes, and what the lookup found of it.

A question is one user with one history and any number of candidates; the pairs of a /score request that share both
are one question. Every item remembers where in the request it stood, so that an error can name the place.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from types import MappingProxyType

from models.assembly import history_window
from models.features import HistoryItem, ItemFeatures
from models.template import Template, window_start
from models.titles import TitleError, clean_title
from service.answers import HistorySource, Skipped, SkipReason
from service.errors import DuplicateCandidateError, TitleRefusedError, UnknownItemError
from service.features.protocol import Features, Query
from service.interactions.histories import IsKnown, MergedUser, everything_known
from service.interactions.live import LiveUser
from service.schemas import ItemRef, OnUnknown, RankRequest, ScoreRequest


@dataclass(frozen=True, slots=True)
class Asked:
    """An item as the client named it, and where."""

    item_id: str
    title: str | None  # in the form of `models.titles.clean_title`
    field: str
    cleaned: bool = False  # the title that was sent is another
    refused: bool = False  # the title that was sent is none, and `on_unknown` is "skip"


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


def questions_of_rank(request: RankRequest) -> list[Question]:
    """Return a /rank request's one question.

    Raises:
        TitleRefusedError: a title is none, and `on_unknown` is "error".
        DuplicateCandidateError: a candidate stands twice.
    """
    first: dict[str, int] = {}
    for index, one in enumerate(request.candidates):
        if (before := first.setdefault(one.item_id, index)) != index:
            raise DuplicateCandidateError(
                f"candidate {one.item_id[:40]!r} stands at {before} and at {index}; send it once",
                f"candidates[{index}]",
            )
    asking = _Asking(request.on_unknown)
    history = asking.history("history", request.history)
    return [Question(request.user_id, history, asking.items("candidates", request.candidates))]


def questions_of_score(request: ScoreRequest) -> tuple[list[Question], list[tuple[int, int]]]:
    """Return a /score request's questions, and for each pair its (question, candidate) place.

    Raises:
        TitleRefusedError: a title is none, and `on_unknown` is "error".
    """
    asking = _Asking(request.on_unknown)
    # A history is told apart by its items, not by where it stood.
    numbers: dict[tuple[str, tuple[tuple[str, str | None], ...] | None], int] = {}
    heads: list[tuple[str, tuple[Asked, ...] | None]] = []
    candidates: list[list[Asked]] = []
    places: list[tuple[int, int]] = []
    for index, pair in enumerate(request.pairs):
        told = None if pair.history is None else tuple((one.item_id, one.title) for one in pair.history)
        number = numbers.setdefault((pair.user_id, told), len(heads))
        if number == len(heads):
            heads.append((pair.user_id, asking.history(f"pairs[{index}].history", pair.history)))
            candidates.append([])
        places.append((number, len(candidates[number])))
        candidates[number].append(asking.item(f"pairs[{index}]", pair.item_id, pair.title))
    questions = [Question(*head, tuple(asked)) for head, asked in zip(heads, candidates, strict=True)]
    return questions, places


def query(
    questions: Sequence[Question],
    template: Template,
    live: Mapping[str, LiveUser] | None = None,
    is_known: IsKnown = everything_known,
) -> Query:
    """Return what to look up: the users, the candidates, and those history entries that the prompt shows.

    `live` is what this server's own log knows of the users, and `is_known` says which items the bundle knows.
    """
    items = {one.item_id for question in questions for one in question.candidates}
    if live and (shown := template.config.max_history):
        stored = {question.user_id for question in questions if question.history is None}
        # No like before a user's last `max_history` of known items can be in the window, whatever else is known.
        for one in stored & live.keys():
            liked = chain((like.item_id for like in reversed(live[one].likes)), (row[2] for row in live[one].earlier))
            items.update(islice(filter(is_known, liked), shown))
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
    merged: Mapping[str, MergedUser] = MappingProxyType({}),
) -> tuple[list[Resolved], list[Skipped]]:
    """Join questions with what was found; users in `merged` are as their live likes made them.

    Raises:
        UnknownItemError: an item is not in the catalogue and has no title, and `on_unknown` is "error".
    """
    skipped: list[Skipped] = []
    resolved = [_resolve(question, found, template, on_unknown, skipped, merged) for question in questions]
    return resolved, skipped


def _resolve(
    question: Question,
    found: Features,
    template: Template,
    on_unknown: OnUnknown,
    skipped: list[Skipped],
    merged: Mapping[str, MergedUser],
) -> Resolved:
    user = merged.get(question.user_id) or MergedUser(found.users.get(question.user_id))
    source: HistorySource
    if question.history is not None:
        source, total = "request", len(question.history)
        told = _window(question.history, template)
        history_ids = frozenset(one.item_id for one in question.history)
        window = [_find(one, found.items, on_unknown, skipped) for one in told]
    else:
        total = user.total
        source = "none" if not total else "live" if user.likes or user.outside else "bundle"
        history_ids = frozenset(user.features.history if user.features is not None else ())
        # The client did not send these, so an item that left the catalogue is dropped and counted, not an error.
        window = [
            PromptItem(Asked(one, None, "history"), item, in_catalogue=True, title_ignored=False)
            for one in _live_window(user, template)
            if (item := found.history_item(one)) is not None
        ]
    candidates = tuple(_find(one, found.items, on_unknown, skipped) for one in question.candidates)
    known = tuple(one for one in window if one is not None)
    return Resolved(question, source, total, history_ids, known, candidates)


def _live_window(user: MergedUser, template: Template) -> Sequence[str]:
    """Return the ids of the window of the items that a user has liked and the bundle knows."""
    if user.features is None:
        return ()
    history, total = user.features.history, user.features.history_total
    shown = total - window_start(total, template.config)
    reach = len(history) if user.reach is None else user.reach
    return history[len(history) - min(shown, reach) :]


def _find(
    asked: Asked, items: Mapping[str, ItemFeatures], on_unknown: OnUnknown, skipped: list[Skipped]
) -> PromptItem | None:
    known = items.get(asked.item_id)
    if known is not None:
        return PromptItem(asked, known, in_catalogue=True, title_ignored=_is_ignored(asked, known.title))
    if asked.title is not None:
        return PromptItem(asked, None, in_catalogue=False, title_ignored=False)
    if on_unknown == "skip":
        reason: SkipReason = "refused_title" if asked.refused else "unknown_item"
        skipped.append(Skipped(field=asked.field, item_id=asked.item_id, reason=reason))
        return None
    raise UnknownItemError(
        f"item {asked.item_id[:40]!r} is not in the catalogue; send its title, or set on_unknown to skip", asked.field
    )


def _is_ignored(asked: Asked, catalogue_title: str) -> bool:
    """Return whether a title was sent that is not the catalogue's.

    The vectors were learned with the catalogue's title; another text beside them is nothing the LM has seen.
    """
    if asked.title is None or asked.title == catalogue_title:
        return asked.refused
    with suppress(TitleError):
        return asked.title != clean_title(catalogue_title)
    return True


def _window(history: Sequence[Asked], template: Template) -> Sequence[Asked]:
    shown = len(history_window([one.item_id for one in history], len(history), template))
    return history[len(history) - shown :]


@dataclass(frozen=True, slots=True)
class _Asking:
    """Reads a request's items, whose titles may be refused."""

    on_unknown: OnUnknown

    def history(self, field: str, items: Sequence[ItemRef] | None) -> tuple[Asked, ...] | None:
        return None if items is None else self.items(field, items)

    def items(self, field: str, items: Sequence[ItemRef]) -> tuple[Asked, ...]:
        return tuple(self.item(f"{field}[{index}]", one.item_id, one.title) for index, one in enumerate(items))

    def item(self, field: str, item_id: str, title: str | None) -> Asked:
        if title is None:
            return Asked(item_id, None, field)
        try:
            cleaned = read_title(f"{field}.title", title)
        except TitleRefusedError:
            if self.on_unknown == "error":
                raise
            return Asked(item_id, None, field, refused=True)
        return Asked(item_id, cleaned, field, cleaned=cleaned != title)


def read_title(field: str, title: str) -> str:
    """Return the form of a title that stands in a prompt.

    Raises:
        TitleRefusedError: it is none.
    """
    try:
        return clean_title(title)
    except TitleError as error:
        raise TitleRefusedError(str(error), field) from error
