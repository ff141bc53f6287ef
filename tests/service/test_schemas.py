from typing import Any

import pytest
from pydantic import ValidationError

from service.schemas import RankRequest, ScoreRequest


def rank(**fields: Any) -> RankRequest:
    return RankRequest.model_validate({"user_id": "u", "candidates": ["a"], **fields})


def test_ids_become_canonical_strings() -> None:
    request = rank(user_id=7, candidates=["007", 8, {"item_id": -9}, {"item_id": "x", "title": "T"}])
    assert request.user_id == "7"
    assert [one.item_id for one in request.candidates] == ["007", "8", "-9", "x"]


@pytest.mark.parametrize("bad", [True, 1.0, 1.5, None, [], {}, "", "x" * 257, "a\x00b", "\ud800", 10**300])
def test_what_is_no_id_is_refused(bad: object) -> None:
    for fields in ({"user_id": bad}, {"candidates": [bad]}, {"candidates": [{"item_id": bad}]}, {"history": [bad]}):
        with pytest.raises(ValidationError):
            rank(**fields)
    with pytest.raises(ValidationError):
        ScoreRequest.model_validate({"pairs": [{"user_id": "u", "item_id": bad}]})


@pytest.mark.parametrize("bad", [7, ["a"], {}])
def test_a_title_is_text(bad: object) -> None:
    with pytest.raises(ValidationError):
        rank(candidates=[{"item_id": "a", "title": bad}])


@pytest.mark.parametrize(
    "fields",
    [
        {"candidates": []},
        {"candidates": None},
        {"top_k": 0},
        {"top_k": True},
        {"top_k": "3"},
        {"top_k": 2.0},
        {"on_unknown": "ignore"},
        {"extra": 1},
        {"candidates": [{"item_id": "a", "name": "x"}]},
        {"history": "a"},
    ],
)
def test_unusable_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        rank(**fields)
