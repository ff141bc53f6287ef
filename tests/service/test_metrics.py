"""Metrics by value: each event counted once, under labels from closed sets, and logged without names."""

import asyncio
import re

import httpx
import pytest
from structlog.testing import capture_logs

from models.loading import Bundle
from service.collaborators import Collaborators
from service.metrics.registry import Metrics
from tests.service.conftest import client_of, collaborators
from tests.service.echo import EchoEngine

pytestmark = pytest.mark.anyio

SECRET = "Secret title 夜"


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


async def drive(client: httpx.AsyncClient) -> None:
    new = {"item_id": "new", "title": SECRET}
    rank = {"user_id": "secret-user", "candidates": ["i1", "i39", new]}
    pairs = [
        {"user_id": "u1", "item_id": "i1"},
        {"user_id": "u18", "item_id": "i38"},
        {"user_id": "u18", "item_id": "i1"},
    ]
    assert (await client.post("/rank", json=rank)).status_code == 200
    assert (await client.post("/score", json={"pairs": pairs})).status_code == 200
    assert (await client.post("/score", json={"pairs": []})).status_code == 422
    for path in ("/nothing", "/rank/1", "/a/b?c=d"):
        assert (await client.get(path)).status_code == 404
    assert (await client.get("/rank")).status_code == 405
    assert (await client.get("/livez")).status_code == 200


async def test_every_event_is_counted_once(client: httpx.AsyncClient, service: Collaborators) -> None:
    await drive(client)
    metrics = service.metrics
    assert value(metrics, "sella_requests_total", route="/rank", outcome="ok") == 1
    assert value(metrics, "sella_requests_total", route="/rank", outcome="invalid") == 1
    assert value(metrics, "sella_requests_total", route="/score", outcome="ok") == 1
    assert value(metrics, "sella_requests_total", route="/score", outcome="invalid") == 1
    assert value(metrics, "sella_requests_total", route="/livez", outcome="ok") == 1
    assert value(metrics, "sella_requests_total", route="unmatched", outcome="invalid") == 3
    for leg in ("lookup", "assemble", "queue", "forward", "total"):
        assert value(metrics, "sella_leg_seconds_count", leg=leg) == 2
    assert value(metrics, "sella_request_candidates_sum", route="/rank") == 3
    assert value(metrics, "sella_request_candidates_sum", route="/score") == 3
    assert value(metrics, "sella_cold_users_total") == 2  # secret-user once, u18 once for its two pairs
    assert value(metrics, "sella_cold_items_total") == 3  # i39, new, i38
    assert value(metrics, "sella_unknown_items_total") == 1
    assert value(metrics, "sella_queue_tokens") == 0
    assert value(metrics, "sella_ready") == 0
    text = (await client.get("/metrics")).text
    assert re.search(r"^sella_ready 1\.0$", text, re.M)
    assert re.search(r'^sella_build_info\{version="[^"]+"\} 1\.0$', text, re.M)
    routes = set(re.findall(r'route="([^"]*)"', text))
    assert routes == {"/rank", "/score", "/livez", "unmatched"}


async def test_refusals_are_counted_by_reason_and_the_queue_returns_to_zero(bundle: Bundle, echo: EchoEngine) -> None:
    service = collaborators(bundle, echo, batches_in_flight=1)
    client = client_of(service)
    echo.gate.clear()
    body = {"user_id": "u1", "candidates": ["i1"]}
    calls = [
        asyncio.create_task(client.post("/rank", json=body, headers={"x-request-timeout-ms": "80"})) for _ in range(6)
    ]
    await asyncio.sleep(0.04)
    assert value(service.metrics, "sella_queue_tokens") == service.current.handle.batcher.waiting_tokens > 0
    assert {one.status_code for one in await asyncio.gather(*calls)} == {504}
    assert value(service.metrics, "sella_refusals_total", reason="deadline") == 6
    assert value(service.metrics, "sella_requests_total", route="/rank", outcome="expired") == 6
    assert value(service.metrics, "sella_queue_tokens") == 0
    echo.gate.set()


async def test_what_a_refusal_took_is_counted_for_429_alone(bundle: Bundle, echo: EchoEngine) -> None:
    service = collaborators(bundle, echo, queue_tokens=64, batches_in_flight=1)
    client = client_of(service)
    body = {"user_id": "u1", "candidates": ["i1"]}
    echo.gate.clear()
    admitted = [asyncio.create_task(client.post("/rank", json=body)) for _ in range(2)]  # one runs, one waits
    while not service.current.handle.batcher.waiting_tokens:
        await asyncio.sleep(0.01)
    assert (await client.post("/rank", json=body)).status_code == 429
    assert (await client.post("/rank", json={})).status_code == 422
    echo.gate.set()
    assert {one.status_code for one in await asyncio.gather(*admitted)} == {200}
    assert value(service.metrics, "sella_refusal_seconds_count") == 1
    assert value(service.metrics, "sella_refusal_seconds_bucket", le="+Inf") == 1
    assert 0 < value(service.metrics, "sella_refusal_seconds_sum") < 60


async def test_a_score_is_logged_once_without_titles_or_users(client: httpx.AsyncClient) -> None:
    with capture_logs() as logs:
        await drive(client)
    scored = [line for line in logs if line["event"] == "scored"]
    assert [(line["route"], line["candidates"]) for line in scored] == [("/rank", 3), ("/score", 3)]
    assert all(line["request_id"] and line["bundle_id"] and line["total"] >= 0 for line in scored)
    assert SECRET not in str(logs)
    assert "secret-user" not in str(logs)


def test_two_applications_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.refused("queue_full")
    assert value(second, "sella_refusals_total", reason="queue_full") == 0
