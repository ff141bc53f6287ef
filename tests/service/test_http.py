"""HTTP as clients meet it, around an engine without torch."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from models.loading import Bundle
from service.app import create_app
from service.background import begin
from service.collaborators import Collaborators
from service.engines.protocol import EngineState, EngineUnavailableError
from tests.service.conftest import client_of, collaborators
from tests.service.echo import EchoEngine

pytestmark = pytest.mark.anyio

GOOD = {"user_id": "u1", "candidates": ["i1", "i2"]}
JSON = {"content-type": "application/json"}


def assert_error(response: httpx.Response, status: int, code: str, field: str | None = None) -> None:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "request_id"}
    assert body["error"]["code"] == code
    assert body["error"].get("field") == field, body
    assert 0 < len(body["error"]["message"]) <= 300
    assert body["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 422, "invalid_request"),
        (b"{", 400, "invalid_json"),
        (b"nonsense", 400, "invalid_json"),
        (b'{"user_id": "\xff"}', 400, "invalid_json"),
        (b"[" * 200_000, 400, "invalid_json"),
        (b'{"user_id":' + b"[" * 900 + b"]" * 900 + b"}", 422, "invalid_request"),
        (b'{"user_id": 1' + b"0" * 5000 + b"}", 400, "invalid_json"),
        (b'{"user_id": "\\ud800", "candidates": ["a"]}', 422, "invalid_request"),
        (b'{"user_id": "u", "candidates": ["a"], "\\ud800": 1}', 422, "invalid_request"),
        (b'{"user_id": NaN, "candidates": ["i1"]}', 422, "invalid_request"),
        (b'{"user_id": "u", "candidates": [Infinity]}', 422, "invalid_request"),
        (b'{"user_id": 1e5, "candidates": ["i1"]}', 422, "invalid_request"),
        (b"null", 422, "invalid_request"),
        (b"[]", 422, "invalid_request"),
        (b'"text"', 422, "invalid_request"),
    ],
)
@pytest.mark.parametrize("route", ["/rank", "/score"])
async def test_unreadable_bodies_are_clear_errors(
    client: httpx.AsyncClient, route: str, body: bytes, status: int, code: str
) -> None:
    response = await client.post(route, content=body, headers=JSON)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        ({"candidates": []}, "invalid_request", "candidates"),
        ({"candidates": ["i1", True]}, "invalid_request", "candidates[1]"),
        ({"candidates": ["i1", {"item_id": 1.5}]}, "invalid_request", "candidates[1].item_id"),
        ({"candidates": ["i1", {"item_id": "x", "title": " \n"}]}, "invalid_request", "candidates[1].title"),
        ({"history": [{"item_id": "x", "title": "\u200b"}]}, "invalid_request", "history[0].title"),
        ({"candidates": ["i1", "i2", "i1"]}, "duplicate_candidate", "candidates[2]"),
        ({"candidates": ["i1", "gone"]}, "unknown_item", "candidates[1]"),
        ({"history": ["i1", "gone"]}, "unknown_item", "history[1]"),
        ({"history": ["i1"] * 1001}, "limit_exceeded", "history"),
        ({"candidates": [f"i{i}" for i in range(1001)]}, "limit_exceeded", "candidates"),
        ({"candidates": [{"item_id": "x", "title": "x" * 513}]}, "limit_exceeded", "candidates[0].title"),
        ({"top_k": 0}, "invalid_request", "top_k"),
        ({"surprise": 1}, "invalid_request", "surprise"),
    ],
)
async def test_contents_that_cannot_be_scored_name_their_place(
    client: httpx.AsyncClient, change: dict[str, Any], code: str, field: str
) -> None:
    assert_error(await client.post("/rank", json={**GOOD, **change}), 422, code, field)


async def test_pairs_name_their_place(client: httpx.AsyncClient) -> None:
    pair: dict[str, Any] = {"user_id": "u1", "item_id": "i1"}
    for pairs, code, field in (
        ([], "invalid_request", "pairs"),
        ([pair] * 1001, "limit_exceeded", "pairs"),
        ([pair, {**pair, "item_id": "gone"}], "unknown_item", "pairs[1]"),
        ([pair, {**pair, "history": ["gone"]}], "unknown_item", "pairs[1].history[0]"),
    ):
        assert_error(await client.post("/score", json={"pairs": pairs}), 422, code, field)


async def test_what_was_sent_is_not_repeated_at_length(client: httpx.AsyncClient) -> None:
    response = await client.post("/rank", json={**GOOD, "x" * 5000: 1})
    assert response.status_code == 422
    assert len(response.content) < 1000


async def test_routes_and_methods_that_do_not_exist(client: httpx.AsyncClient) -> None:
    assert_error(await client.get("/nothing"), 404, "not_found")
    assert_error(await client.post("/rank/", json=GOOD), 404, "not_found")
    response = await client.get("/rank")
    assert_error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": ";;;"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
async def test_only_plain_json_is_read(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    assert_error(
        await client.post("/rank", content=json.dumps(GOOD).encode(), headers=headers), 415, "unsupported_media_type"
    )


async def test_a_declared_charset_is_still_json(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    assert (await client.post("/rank", content=json.dumps(GOOD), headers=headers)).status_code == 200


async def test_a_long_body_is_refused_declared_or_streamed(client: httpx.AsyncClient) -> None:
    seen = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal seen
        for _ in range(100):
            seen += 1
            yield b" " * 100_000

    assert_error(await client.post("/rank", content=b" " * 1_048_577, headers=JSON), 413, "body_too_large")
    assert_error(await client.post("/rank", content=endless(), headers=JSON), 413, "body_too_large")
    assert seen < 15
    body = json.dumps(GOOD).encode()
    exact = body + b" " * (1_048_576 - len(body))
    assert (await client.post("/rank", content=exact, headers=JSON)).status_code == 200


async def test_a_sane_request_id_is_kept_and_another_is_made(client: httpx.AsyncClient) -> None:
    response = await client.post("/rank", json=GOOD, headers={"x-request-id": "abc-1.2:3_4"})
    assert response.headers["x-request-id"] == response.json()["request_id"] == "abc-1.2:3_4"
    for odd in ("", "x" * 65, "a b", "a\tb", '"'):
        response = await client.post("/rank", json=GOOD, headers={"x-request-id": odd})
        assert len(response.json()["request_id"]) == 32


async def test_top_k_cuts_and_ties_keep_the_requests_order(client: httpx.AsyncClient) -> None:
    twins = [{"item_id": f"twin{i}", "title": "Equal in every token"} for i in (3, 1, 2)]
    body = {"user_id": "u1", "candidates": ["i1", twins[0], "i2", *twins[1:], "i3"]}
    results = (await client.post("/rank", json=body)).json()["results"]
    assert [one["item_id"] for one in results if one["item_id"].startswith("twin")] == ["twin3", "twin1", "twin2"]
    scores = [one["score"] for one in results]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 4
    cut = (await client.post("/rank", json={**body, "top_k": 3})).json()["results"]
    assert cut == results[:3]
    assert (await client.post("/rank", json={**body, "top_k": 10**9})).json()["results"] == results


async def test_timings_are_in_body_and_header(client: httpx.AsyncClient, bundle: Bundle) -> None:
    response = await client.post("/rank", json=GOOD)
    timings = response.json()["timings_ms"]
    assert list(timings) == ["lookup", "assemble", "queue", "forward", "total"]
    assert sum(timings[leg] for leg in list(timings)[:4]) <= timings["total"] + 0.01
    assert [one.split(";")[0].strip() for one in response.headers["server-timing"].split(",")] == list(timings)
    assert response.json()["bundle_id"] == bundle.id


async def test_a_full_queue_is_429_with_retry_after(bundle: Bundle, echo: EchoEngine) -> None:
    echo.gate.clear()
    async with client_of(collaborators(bundle, echo, queue_tokens=64, batches_in_flight=1)) as client:
        running = [asyncio.create_task(client.post("/rank", json=GOOD)) for _ in range(2)]
        while not echo.batches:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        response = await client.post("/rank", json=GOOD)
        assert_error(response, 429, "queue_full")
        assert int(response.headers["retry-after"]) >= 1
        echo.gate.set()
        assert [one.status_code for one in await asyncio.gather(*running)] == [200, 200]


async def test_a_deadline_from_the_header_is_504_and_the_job_is_cancelled(
    client: httpx.AsyncClient, echo: EchoEngine
) -> None:
    echo.gate.clear()
    response = await client.post("/rank", json=GOOD, headers={"x-request-timeout-ms": "30"})
    assert_error(response, 504, "deadline_exceeded")
    [[job]] = echo.batches
    assert echo.cancelled == [job.id]
    for odd in ("0", "-1", "soon", "600001", "1.5"):
        response = await client.post("/rank", json=GOOD, headers={"x-request-timeout-ms": odd})
        assert_error(response, 422, "invalid_request", "X-Request-Timeout-Ms")


async def test_an_engine_that_is_not_ready_is_503_with_retry_after(
    client: httpx.AsyncClient, service: Collaborators, echo: EchoEngine
) -> None:
    echo.state = EngineState.STARTING
    response = await client.post("/rank", json=GOOD)
    assert_error(response, 503, "not_ready")
    assert int(response.headers["retry-after"]) >= 1
    assert (await client.get("/livez")).status_code == 200
    ready = await client.get("/readyz")
    assert (ready.status_code, ready.json()["engine"]["state"]) == (503, "starting")
    echo.state = EngineState.READY
    assert (await client.get("/readyz")).status_code == 200
    service.bundles.stopping = True
    assert (await client.get("/readyz")).status_code == 503


async def test_an_engine_that_dies_under_a_request_is_503(client: httpx.AsyncClient, echo: EchoEngine) -> None:
    echo.error = EngineUnavailableError("died")
    assert_error(await client.post("/rank", json=GOOD), 503, "not_ready")
    echo.error = RuntimeError("odd")
    assert_error(await client.post("/rank", json=GOOD), 503, "scoring_failed")


async def test_an_error_of_our_own_is_told_in_the_same_shape(
    client: httpx.AsyncClient, service: Collaborators, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(type(service.bundles.current.store), "look_up", broken)
    response = await client.post("/rank", json=GOOD)
    assert_error(response, 500, "internal_error")
    assert "secret" not in response.text


async def test_a_client_that_leaves_takes_its_job_along(service: Collaborators, echo: EchoEngine) -> None:
    """Driven as raw ASGI: httpx's in-process transport cannot hang up."""
    from service.app import create_app

    echo.gate.clear()
    app = create_app(service)
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/rank",
        "raw_path": b"/rank",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "server": ("sella", 80),
    }
    await messages.put({"type": "http.request", "body": json.dumps(GOOD).encode(), "more_body": False})
    call = asyncio.create_task(app(scope, messages.get, send))
    while not echo.batches:
        await asyncio.sleep(0.01)
    await messages.put({"type": "http.disconnect"})
    await asyncio.wait_for(call, 5)
    [[job]] = echo.batches
    assert echo.cancelled == [job.id]
    assert sent[0]["status"] == 499
    assert service.bundles.current.batcher.waiting_tokens == 0
    assert service.metrics.registry.get_sample_value("sella_refusals_total", {"reason": "client_gone"}) == 1


async def test_openapi_documents_both_routes_with_examples_and_errors(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()
    for route in ("/score", "/rank"):
        responses = schema["paths"][route]["post"]["responses"]
        assert set(responses) == {"200", "400", "401", "403", "408", "413", "415", "422", "429", "503", "504"}
        assert responses["422"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorResponse")
    for name in ("ScoreRequest", "RankRequest", "ScoreResponse", "RankResponse", "ErrorResponse"):
        assert schema["components"]["schemas"][name]["examples"]
    assert (await client.get("/docs")).status_code == 200


async def test_the_examples_in_the_schema_are_true(client: httpx.AsyncClient) -> None:
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    for route, name in (("/score", "Score"), ("/rank", "Rank")):
        response = await client.post(route, json=schemas[f"{name}Request"]["examples"][0] | {"on_unknown": "skip"})
        assert response.status_code == 200
        assert set(response.json()) == set(schemas[f"{name}Response"]["examples"][0])
        assert set(response.json()["results"][0]) == set(schemas[f"{name}Response"]["examples"][0]["results"][0])


@pytest.mark.parametrize(
    "path",
    [
        "/rank%0A",
        "/rank%0D",
        "/rank%0D%0A",
        "/rank%00",
        "/rank;v=1",
        "//rank",
        "/rank/",
        "/RANK",
        "/rank%2F",
    ],
)
async def test_another_path_is_another_route(client: httpx.AsyncClient, path: str) -> None:
    assert_error(await client.post(raw(path), json=GOOD), 404, "not_found")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/users/u1%0A", 404),
        ("/users/u1%0D%0A", 404),
        ("/users/u%0A1", 404),
        ("/users/u1%00", 422),
        ("/users/u1%E2%80%A8", 422),
        ("/users/", 422),
        ("/users/u1/", 422),
        ("/users//u1", 422),
        ("/users/100%", 422),
        ("/users/u1%4", 422),
        ("/users/u1%zz", 422),
        ("/users/u1?force=true", 422),
        ("/%75sers/u1", 422),
        ("/users%0A/u1", 404),
        ("/admin/bundle/canary%0A", 404),
        ("/admin/bundle/canary%00", 422),
        ("/admin/bundle/Canary", 422),
        ("/admin/bundle/canary%2F", 404),
        ("/admin/bundle%0A", 404),
    ],
)
async def test_a_path_that_is_not_plain_deletes_nothing(
    service: Collaborators, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, path: str, status: int
) -> None:
    async def deleted(*_: object) -> float:
        raise AssertionError("something was deleted")

    monkeypatch.setattr(type(service.interactions), "delete", deleted)
    monkeypatch.setattr(type(service.changes), "end", deleted)
    assert (await client.delete(raw(path))).status_code == status


def raw(path: str) -> httpx.URL:
    """A URL whose path httpx leaves as it is: a client in another language may send any."""
    url = httpx.URL("http://sella/")
    url._uri_reference = url._uri_reference.copy_with(path=path.partition("?")[0], query=path.partition("?")[2] or None)
    return url


async def test_what_would_not_be_read_is_refused(client: httpx.AsyncClient) -> None:
    assert_error(await client.post("/rank?top_k=3", json=GOOD), 422, "invalid_request")
    for name in ("X-Request-Timeout", "Request-Timeout-Ms", "X-Timeout-Ms", "X-Request-Timout-Ms"):
        assert_error(await client.post("/rank", json=GOOD, headers={name: "50"}), 422, "invalid_request", name.lower())
    for name in ("X-Request-Start", "X-Envoy-Expected-Rq-Timeout-Ms", "Keep-Alive", "X-Request-Time"):
        assert (await client.post("/rank", json=GOOD, headers={name: "timeout=5"})).status_code == 200
    for path in ("/livez?now=1", "/readyz?now=1"):  # probes add what they like
        assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
async def test_head_answers_as_get_without_a_body(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.head(path)).status_code == (await client.get(path)).status_code == 200


@pytest.mark.parametrize("share", [True, "1", "0.5", [1], None])
async def test_a_share_is_a_number(client: httpx.AsyncClient, share: object) -> None:
    body = {"bundle": "b", "role": "canary", "share": share}
    assert_error(await client.post("/admin/bundle", json=body), 422, "invalid_request", "share")
    for wait in (1, "no", "false", None):
        answer = await client.post("/admin/bundle", json={"bundle": "b", "wait": wait})
        assert_error(answer, 422, "invalid_request", "wait")


async def test_a_background_task_that_dies_is_told(service: Collaborators) -> None:
    app = create_app(service)
    async with app.router.lifespan_context(app), client_of(service) as client:
        assert (await client.get("/readyz")).status_code == 200

        async def die() -> None:
            raise RuntimeError("secret detail")

        with capture_logs() as logs:
            await asyncio.gather(begin(die(), "shadow", vital=False), return_exceptions=True)
            assert (await client.get("/readyz")).status_code == 200
            await asyncio.gather(begin(die(), "replay"), return_exceptions=True)
            await asyncio.sleep(0)
        assert [(one["event"], one["task"]) for one in logs] == [("task_died", "shadow"), ("task_died", "replay")]
        ready = await client.get("/readyz")
        assert ready.status_code == 503 and ready.json()["background"] == ["replay"]
