from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from models.loading import Bundle
from models.template import Template
from service.errors import DuplicateCandidateError, LimitError, UnknownItemError
from service.features.protocol import Features
from service.questions import Question, query, questions_of_rank, questions_of_score, resolve
from service.schemas import RankRequest, ScoreRequest
from service.settings import Settings

LIMITS = Settings(bundle=Path("unused"), max_pairs=3, max_candidates=3, max_history=20, max_title=10)


@pytest.fixture(scope="module")
def template(bundle: Bundle) -> Template:
    return Template(bundle.manifest.template, bundle.encoder())


def rank(**fields: Any) -> list[Question]:
    return questions_of_rank(
        RankRequest.model_validate({"user_id": "u", "candidates": ["a"], **fields}, context=LIMITS)
    )


def pairs(*given: dict[str, Any]) -> tuple[list[Question], list[tuple[int, int]]]:
    return questions_of_score(ScoreRequest.model_validate({"pairs": list(given)}, context=LIMITS))


def limit_exceeded(error: ValidationError) -> str:
    """Return the place of the one error, which is a limit's."""
    [told] = error.errors()
    assert told["type"] == LimitError.code
    return "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in told["loc"]).removeprefix(".")


def test_pairs_of_one_user_and_history_are_one_question() -> None:
    questions, places = pairs(
        {"user_id": "u", "item_id": "a"},
        {"user_id": "u", "item_id": "a", "history": []},
        {"user_id": "u", "item_id": "b", "history": None},
    )
    assert [[one.item_id for one in question.candidates] for question in questions] == [["a", "b"], ["a"]]
    assert [question.history for question in questions] == [None, ()]
    assert places == [(0, 0), (1, 0), (0, 1)]


def test_equal_histories_are_one_and_unequal_titles_are_not() -> None:
    same = {"user_id": "u", "item_id": "a", "history": ["x", 7]}
    assert len(pairs(same, {**same, "history": ["x", "7"]})[0]) == 1
    assert len(pairs(same, {**same, "history": [{"item_id": "x", "title": "T"}, 7]})[0]) == 2


def test_a_duplicate_candidate_is_refused_by_place() -> None:
    with pytest.raises(DuplicateCandidateError, match="'7' stands at 0 and at 2") as caught:
        rank(candidates=["7", "a", 7])
    assert caught.value.field == "candidates[2]"


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"candidates": ["a", "b", "c", "d"]}, "candidates"),
        ({"history": ["a"] * 21}, "history"),
        ({"candidates": ["b", {"item_id": "a", "title": "x" * 11}]}, "candidates[1].title"),
        ({"history": [{"item_id": "a", "title": "x" * 11}]}, "history[0].title"),
    ],
)
def test_limits_name_the_place(fields: dict[str, Any], place: str) -> None:
    with pytest.raises(ValidationError) as caught:
        rank(**fields)
    assert limit_exceeded(caught.value) == place


def test_limits_of_pairs_name_the_place() -> None:
    pair: dict[str, Any] = {"user_id": "u", "item_id": "a"}
    for given, place in (
        ([pair] * 4, "pairs"),
        ([pair, {**pair, "title": "x" * 11}], "pairs[1].title"),
        ([pair, {**pair, "history": ["a"] * 21}], "pairs[1].history"),
    ):
        with pytest.raises(ValidationError) as caught:
            pairs(*given)
        assert limit_exceeded(caught.value) == place


def test_only_the_window_is_looked_up(template: Template) -> None:
    # 13 entries, a window of at most 10 that moves in steps of 5: the first 5 are before it.
    asked = query(rank(history=[f"h{i}" for i in range(13)]), template)
    assert asked.item_ids == {"a", *(f"h{i}" for i in range(5, 13))}
    assert asked.histories_of == frozenset()
    assert query(rank(), template).histories_of == {"u"}


def test_an_unknown_item_without_a_title_is_an_error_that_names_it(template: Template) -> None:
    with pytest.raises(UnknownItemError, match="'a' is not in the catalogue") as caught:
        resolve(rank(), Features({}, {}), template, "error")
    assert caught.value.field == "candidates[0]"
    with pytest.raises(UnknownItemError) as caught:
        resolve(
            rank(history=["x"] * 12, candidates=[{"item_id": "a", "title": "T"}]), Features({}, {}), template, "error"
        )
    assert caught.value.field == "history[5]"


def test_skipping_reports_the_place_and_keeps_the_count(template: Template, bundle: Bundle) -> None:
    tables = bundle.tables()
    item = tables.item("i1")
    assert item is not None
    [resolved], skipped = resolve(
        rank(history=["i1", "gone", "i1"], candidates=["i1", "gone"]), Features({}, {"i1": item}), template, "skip"
    )
    assert [(one.field, one.item_id) for one in skipped] == [("history[1]", "gone"), ("candidates[1]", "gone")]
    assert (resolved.total, len(resolved.window), resolved.candidates[1]) == (3, 2, None)


def test_a_stored_history_drops_items_that_left_the_catalogue(template: Template, bundle: Bundle) -> None:
    user = bundle.tables().user("u1")
    item = bundle.tables().item("i1")
    assert user is not None and item is not None and user.history
    [resolved], skipped = resolve(
        rank(user_id="u1", candidates=["i1"]), Features({"u1": user}, {"i1": item}), template, "error"
    )
    assert not skipped
    assert (resolved.source, resolved.total) == ("bundle", user.history_total)
    assert len(resolved.window) == sum(one == "i1" for one in user.history)
