from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from service.schemas import BundleRequest, InteractionEvent, InteractionsRequest, RankRequest, ScoreRequest


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


def event(timestamp: object) -> float:
    body = {"event_id": 1, "user_id": 1, "item_id": 1, "timestamp": timestamp}
    return InteractionsRequest.model_validate({"interactions": [body]}).interactions[0].timestamp


@pytest.mark.parametrize(
    "bad", ["20171130", 20171130, 20171130.0, "2017", 2017, " 20171130 ", "1" * 65, True, None, "", "nan", "1e400", []]
)
def test_what_is_no_time_is_refused(bad: object) -> None:
    with pytest.raises(ValidationError):
        event(bad)


@pytest.mark.parametrize("good", [1_700_000_000, "1700000000", 1.5e9, 20171330, 0, 5, "2017-11-30", -1e9, 17001130])
def test_seconds_and_iso_texts_are_times(good: object) -> None:
    assert isinstance(event(good), float)


# What JSON has in place of a number or a truth value, field by field.
@pytest.mark.parametrize(
    ("model", "body", "field", "bad"),
    [
        (RankRequest, {"user_id": 1, "candidates": [1]}, "top_k", [True, "1", 1.0]),
        (RankRequest, {"user_id": 1, "candidates": [1]}, "explain", [1, "true", 0.0]),
        (RankRequest, {"user_id": 1, "candidates": [1]}, "on_unknown", [True, 1, None]),
        (ScoreRequest, {"pairs": [{"user_id": 1, "item_id": 1}]}, "explain", [1, "true"]),
        (BundleRequest, {"bundle": "b"}, "share", [True, False, "0.5", 0, 2]),
        (BundleRequest, {"bundle": "b"}, "wait", [1, "true", 0]),
        (BundleRequest, {"bundle": "b"}, "bundle", [1, True]),
        (BundleRequest, {"bundle": "b"}, "role", [True, 0]),
        (InteractionEvent, {"event_id": 1, "user_id": 1, "item_id": 1, "timestamp": 5}, "position", [True, "1", 1.0]),
        (InteractionEvent, {"event_id": 1, "user_id": 1, "item_id": 1, "timestamp": 5}, "label", ["1", 1.0, 2]),
        (InteractionEvent, {"event_id": 1, "user_id": 1, "item_id": 1, "timestamp": 5}, "timestamp", [True]),
        (InteractionEvent, {"event_id": 1, "user_id": 1, "item_id": 1, "timestamp": 5}, "request_id", [1, "a\n"]),
        (InteractionEvent, {"event_id": 1, "user_id": 1, "item_id": 1, "timestamp": 5}, "user_id", [True, 1.0]),
    ],
)
def test_a_value_of_another_type_is_not_taken_for_one(
    model: type[BaseModel], body: dict[str, Any], field: str, bad: list[object]
) -> None:
    assert model.model_validate(body)
    for value in bad:
        with pytest.raises(ValidationError) as refusal:
            model.model_validate({**body, field: value})
        assert [error["loc"] for error in refusal.value.errors()] == [(field,)], value
