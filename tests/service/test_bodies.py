"""The work that a body can make is bounded before the work is done."""

import asyncio
import json
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.exceptions import RequestValidationError

from models.loading import Bundle
from service.bodies import INLINE_BYTES, MOST_WAITING, Bodies, parse, separators
from service.errors import InvalidJsonError, LimitError, RequestError
from service.schemas import BundleRequest, InteractionsRequest, RankRequest, RequestBody, ScoreRequest
from service.settings import Settings
from tests.service.test_connections import Listening, listening

pytestmark = pytest.mark.anyio

LIMIT = 1_048_576
MODELS: dict[str, type[RequestBody]] = {
    "/rank": RankRequest,
    "/score": ScoreRequest,
    "/interactions": InteractionsRequest,
    "/admin/bundle": BundleRequest,
}
RANK, SCORE, EVENTS = b'{"user_id":"u1","candidates":[', b'{"pairs":[', b'{"interactions":['


def filled(head: bytes, unit: bytes, tail: bytes) -> bytes:
    return (head + unit * ((LIMIT - len(head) - len(tail)) // len(unit))).rstrip(b",") + tail


def keys(count: int) -> bytes:
    return b",".join(b'"k%d":1' % number for number in range(count))


PAIR = b'{"user_id":1,"item_id":1,"history":['
TITLE = b'{"user_id":"u1","candidates":[{"item_id":"x","title":"'
SHAPES: dict[str, tuple[str, bytes]] = {
    "empty ids": ("/rank", filled(RANK, b'"",', b"]}")),
    "whole numbers": ("/rank", filled(RANK, b"1,", b"]}")),
    "fractions": ("/rank", filled(RANK, b"1.1,", b"]}")),
    "objects": ("/rank", filled(RANK, b"{},", b"]}")),
    "lists": ("/rank", filled(RANK, b"[],", b"]}")),
    "deep lists": ("/rank", filled(RANK, b"[" * 400 + b"]" * 400 + b",", b"]}")),
    "deeper lists": ("/rank", b'{"user_id":' + b"[" * 400_000 + b"]" * 400_000 + b"}"),
    "deep objects": ("/rank", b'{"user_id":' * 95_000),
    "a title": ("/rank", TITLE + b"a" * (LIMIT - 100) + b'"}]}'),
    "a title of escapes": ("/rank", TITLE + b"\\u200b" * ((LIMIT - 100) // 6) + b'"}]}'),
    "digits": ("/rank", b'{"user_id":1' + b"0" * (LIMIT - 100) + b',"candidates":["a"]}'),
    "many digits often": ("/rank", filled(RANK, b"9" * 4299 + b",", b"]}")),
    "keys": ("/rank", b'{"user_id":"u1","candidates":["a"],' + keys(90_000) + b"}"),
    "a key again and again": ("/rank", b'{"user_id":"u1",' + b'"history":["a"],' * 65_000 + b'"candidates":["a"]}'),
    "commas": ("/rank", b"," * LIMIT),
    "quotes": ("/rank", b'"' * LIMIT),
    "backslashes": ("/rank", b'{"user_id":"' + b"\\\\" * ((LIMIT - 100) // 2) + b'"}'),
    "not UTF-8 at the end": ("/rank", b'{"user_id":"' + b"a" * (LIMIT - 100) + b'\xff"}'),
    "empty pairs": ("/score", filled(SCORE, b"{},", b"]}")),
    "histories": ("/score", filled(SCORE, PAIR + b"1," * 999 + b"1]},", b"]}")),
    "histories of empty ids": ("/score", filled(SCORE, PAIR + b'"",' * 900 + b'""]},', b"]}")),
    "one history": ("/score", filled(SCORE + PAIR, b"1,", b"]}]}")),
    "keys of pairs": ("/score", filled(SCORE, b"{" + keys(900) + b"},", b"]}")),
    "nulls": ("/interactions", filled(EVENTS, b"null,", b"]}")),
    "a timestamp": ("/interactions", EVENTS + b'{"timestamp":"' + b"1" * (LIMIT - 100) + b'"}]}'),
    "a bundle's keys": ("/admin/bundle", b'{"bundle":"x",' + keys(90_000) + b"}"),
    "a bundle of numbers": ("/admin/bundle", filled(b'{"bundle":[', b"1,", b"]}")),
}
PAIRS = [{"user_id": user, "item_id": "i1", "history": [f"i{user}x{one}" for one in range(990)]} for user in range(20)]


def titled(title: str, count: int) -> dict[str, Any]:
    return {"user_id": 1, "candidates": [{"item_id": f"n{number}", "title": title} for number in range(count)]}


LEGAL: dict[str, tuple[str, dict[str, Any]]] = {
    "titles of commas": ("/rank", titled("a," * 250, 1000)),
    "titles of quotes": ("/rank", titled('"[{,\\' * 100, 900)),
    "histories": ("/score", {"pairs": PAIRS, "on_unknown": "skip"}),
}


@pytest.fixture
def settings() -> Settings:
    return Settings(bundle=Path("b"))


@pytest.mark.parametrize("name", SHAPES)
def test_a_body_over_the_limits_is_refused_before_its_values_are_built(settings: Settings, name: str) -> None:
    route, body = SHAPES[name]
    assert len(body) <= LIMIT
    tracemalloc.start()
    try:
        with pytest.raises((RequestError, RequestValidationError)) as refusal:
            parse(body, MODELS[route], settings)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * LIMIT  # a few copies of the text; a list of its entries takes 80 times as much
    if isinstance(refusal.value, RequestValidationError):
        assert len(refusal.value.errors()) < 10


@pytest.mark.parametrize("name", LEGAL)
def test_marks_in_strings_are_no_values(settings: Settings, name: str) -> None:
    route, body = LEGAL[name]
    text = json.dumps(body).encode()
    assert len(text) > INLINE_BYTES
    assert parse(text, MODELS[route], settings)


def test_values_are_counted_outside_strings_alone() -> None:
    text = json.dumps({"a": [1, 2, {"b,[": '\\",["{', "c\\": ",\\\\"}], "d": '"'}).encode()
    assert separators(text, 0) == (4, 3)
    assert separators(text, 100)[0] == text.count(b",")  # few enough in any case


def test_histories_together_have_a_limit(settings: Settings) -> None:
    pairs = [{"user_id": user, "item_id": 1, "history": list(range(1000))} for user in range(21)]
    with pytest.raises(RequestValidationError) as refusal:
        parse(json.dumps({"pairs": pairs}).encode(), ScoreRequest, settings)
    [error] = refusal.value.errors()
    assert error["type"] == "limit_exceeded" and "21000 entries of histories" in error["msg"]
    assert len(parse(json.dumps({"pairs": pairs[:20]}).encode(), ScoreRequest, settings).pairs) == 20


@pytest.mark.parametrize("text", ['{"a":1}', "[1]", "1"])
def test_other_encodings_than_utf_8_are_no_json(settings: Settings, text: str) -> None:
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        with pytest.raises(InvalidJsonError):
            parse(text.encode(encoding), RankRequest, settings)
    body = '{"user_id": "é", "candidates": [1]}'
    assert parse(body.encode("utf-8-sig"), RankRequest, settings).user_id == "é"


async def test_long_bodies_are_parsed_one_at_a_time_and_only_so_many_wait(settings: Settings) -> None:
    bodies = Bodies(settings)
    body = json.dumps({"user_id": 1, "candidates": [f"item-{number}" for number in range(1000)]}).encode()
    assert len(body) > INLINE_BYTES
    results = await asyncio.gather(
        *(bodies.parse(body, RankRequest) for _ in range(MOST_WAITING + 10)), return_exceptions=True
    )
    assert [type(one).__name__ for one in results].count("QueueFullError") == 10
    assert sum(isinstance(one, RankRequest) for one in results) == MOST_WAITING


@pytest.fixture(scope="module")
def server(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listening]:
    with listening(bundle, interactions=tmp_path_factory.mktemp("log") / "log.sqlite") as server:
        yield server


def test_no_body_holds_the_event_loop(server: Listening) -> None:
    """On a free machine the longest delay is some 30 ms; before there were bounds it was 14 s."""
    url, delays, stop = f"http://127.0.0.1:{server.port}", [0.0], threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            while not stop.is_set():
                began = time.monotonic()
                assert client.get("/livez").status_code == 200
                delays.append(time.monotonic() - began)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            for route, body in SHAPES.values():
                answer = client.post(route, content=body, headers={"content-type": "application/json"})
                assert answer.status_code in (400, 422) and len(answer.content) < 1000, answer.text
            for route, legal in LEGAL.values():
                assert client.post(route, json=legal).status_code == 200
    finally:
        stop.set()
        asking.join()
    assert max(delays) < 1.0


def test_a_limit_names_its_place(settings: Settings) -> None:
    with pytest.raises(LimitError, match="more than 4064 values"):
        parse(filled(RANK, b"1,", b"]}"), RankRequest, settings)
