"""Metrics by value: each event counted once, under labels from closed sets, and logged without names."""

import asyncio
import re
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from models.loading import Bundle
from service.collaborators import Collaborators
from service.engines.protocol import EngineUsage, ScoreJob
from service.metrics.registry import Metrics
from tests.service.conftest import client_of, collaborators
from tests.service.echo import EchoEngine

pytestmark = pytest.mark.anyio

REFERENCE = {
    "score_deciles": [step / 10 for step in range(11)],
    "history_length_deciles": [0, 1, 2, 3, 4, 5, 8, 12, 20, 40, 100],
    "cold_user_rate": 0.1,
    "cold_item_rate": 0.05,
}
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


async def test_every_event_is_counted_once(client: httpx.AsyncClient, service: Collaborators, bundle: Bundle) -> None:
    await drive(client)
    metrics, mine = service.metrics, {"bundle": bundle.id[:12]}
    assert value(metrics, "sella_requests_total", route="/rank", outcome="ok") == 1
    assert value(metrics, "sella_requests_total", route="/rank", outcome="invalid") == 1
    assert value(metrics, "sella_requests_total", route="/score", outcome="ok") == 1
    assert value(metrics, "sella_requests_total", route="/score", outcome="invalid") == 1
    assert value(metrics, "sella_requests_total", route="/livez", outcome="ok") == 1
    assert value(metrics, "sella_requests_total", route="unmatched", outcome="invalid") == 3
    for leg in ("lookup", "assemble", "queue", "forward", "total"):
        assert value(metrics, "sella_leg_seconds_count", leg=leg, **mine) == 2
    assert value(metrics, "sella_request_candidates_sum", route="/rank", **mine) == 3
    assert value(metrics, "sella_request_candidates_sum", route="/score", **mine) == 3
    assert value(metrics, "sella_cold_users_total", **mine) == 2  # secret-user once, u18 once for its two pairs
    assert value(metrics, "sella_cold_items_total", **mine) == 3  # i39, new, i38
    assert value(metrics, "sella_unknown_items_total", **mine) == 1
    assert value(metrics, "sella_queue_tokens") == 0
    assert value(metrics, "sella_ready") == 0
    text = (await client.get("/metrics")).text
    assert re.search(r"^sella_ready 1\.0$", text, re.M)
    assert re.search(r'^sella_build_info\{version="[^"]+"\} 1\.0$', text, re.M)
    routes = set(re.findall(r'route="([^"]*)"', text))
    assert routes == {"/rank", "/score", "/livez", "unmatched"}


async def test_scores_and_histories_are_counted_as_the_answers_tell_them(
    client: httpx.AsyncClient, service: Collaborators, bundle: Bundle
) -> None:
    told: list[dict[str, Any]] = []
    histories: list[dict[str, Any]] = []
    for user in ("u0", "u1", "nobody"):
        answer = (await client.post("/rank", json={"user_id": user, "candidates": [f"i{i}" for i in range(30)]})).json()
        told += answer["results"]
        histories.append(answer["history"])
    scores, metrics, mine = [one["score"] for one in told], service.metrics, {"bundle": bundle.id[:12]}
    for edge in (0.05, 0.5, 0.95, 1.0):
        counted = value(metrics, "sella_scores_bucket", le=str(edge), **mine)
        assert counted == sum(score <= edge for score in scores)
    assert value(metrics, "sella_scores_count", **mine) == 90
    assert value(metrics, "sella_scores_sum", **mine) == pytest.approx(sum(scores))
    given = [one["given"] for one in histories]
    assert value(metrics, "sella_history_length_sum", **mine) == sum(given) >= 23
    assert value(metrics, "sella_history_length_bucket", le="0.0", **mine) == given.count(0)
    assert value(metrics, "sella_history_dropped_total", **mine) == sum(one["dropped"] for one in histories) > 0


async def test_batches_are_counted_as_the_engine_gets_them(bundle: Bundle, echo: EchoEngine) -> None:
    service = collaborators(bundle, echo, batches_in_flight=1)
    echo.gate.clear()
    async with client_of(service) as client:
        new = {"item_id": "new", "title": "New"}
        calls = [
            asyncio.create_task(client.post("/rank", json={"user_id": f"u{user}", "candidates": candidates}))
            for user, candidates in enumerate((["i1", "i2"], ["i3"], ["i4", "i5", new]))
        ]
        while not echo.batches:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        echo.gate.set()
        assert [one.status_code for one in await asyncio.gather(*calls)] == [200] * 3
    kinds = [("score" if isinstance(batch[0], ScoreJob) else "distil") for batch in echo.batches]
    scored = [job.group for batch in echo.batches for job in batch if isinstance(job, ScoreJob)]
    for kind in ("score", "distil"):
        assert value(service.metrics, "sella_batch_tokens_count", kind=kind) == kinds.count(kind) > 0
    assert value(service.metrics, "sella_batch_requests_sum", kind="score") == len(scored) == 3
    assert value(service.metrics, "sella_batch_requests_sum", kind="distil") == 1
    assert value(service.metrics, "sella_batch_candidates_sum") == 6
    assert value(service.metrics, "sella_batch_tokens_sum", kind="score") == sum(one.pack.tokens for one in scored)


async def test_requests_that_share_a_batch_are_counted_each(bundle: Bundle, echo: EchoEngine) -> None:
    service = collaborators(bundle, echo, batches_in_flight=1)
    echo.gate.clear()
    async with client_of(service) as client:
        bodies = [{"user_id": f"u{user}", "candidates": ["i1", "i2"]} for user in range(4)]
        calls = [asyncio.create_task(client.post("/rank", json=body)) for body in bodies]
        while len(echo.batches) < 1:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # the first is computed, the others wait together
        echo.gate.set()
        assert [one.status_code for one in await asyncio.gather(*calls)] == [200] * 4
    assert value(service.metrics, "sella_batch_requests_sum", kind="score") == 4
    assert value(service.metrics, "sella_batch_requests_count", kind="score") == len(echo.batches) < 4


async def test_engines_are_added_up_and_counted_once(
    client: httpx.AsyncClient, service: Collaborators, echo: EchoEngine
) -> None:
    echo.used = EngineUsage(3, 700, 200, 100, cache_bytes=50, memory_bytes=60, memory_total_bytes=100, device="cpu")
    for _ in range(2):
        await client.get("/metrics")
    other = EchoEngine()
    other.used = EngineUsage(1, 10, 20, 30, cache_bytes=5, memory_bytes=6, memory_total_bytes=100, device="cpu")
    service.metrics.engine.read([echo, other, echo])
    assert value(service.metrics, "sella_forwards_total") == 4
    assert value(service.metrics, "sella_tokens_total") == 710
    assert value(service.metrics, "sella_cached_tokens_total") == 220
    assert value(service.metrics, "sella_packing_saved_tokens_total") == 130
    assert value(service.metrics, "sella_engine_cache_bytes", device="cpu") == 55
    assert value(service.metrics, "sella_engine_memory_bytes", device="cpu") == 66
    assert value(service.metrics, "sella_engine_memory_total_bytes", device="cpu") == 100
    service.metrics.engine.read([other])  # the first was closed: what it did stays counted, what it took is free
    assert value(service.metrics, "sella_tokens_total") == 710
    assert value(service.metrics, "sella_engine_memory_bytes", device="cpu") == 6


async def test_a_retired_bundle_leaves_no_series(client: httpx.AsyncClient, service: Collaborators) -> None:
    service.metrics.loaded("f" * 64, REFERENCE)
    await drive(client)
    label = f'bundle="{service.bundles.current.bundle_id[:12]}"'
    assert service.metrics.text().decode().count(label) > 50
    service.metrics.retired(service.bundles.current.bundle_id)
    text = service.metrics.text().decode()
    assert label not in text
    assert 'sella_scores_count{bundle="ffffffffffff"} 0.0' in text


def test_reasons_and_outcomes_exist_before_they_happen() -> None:
    metrics = Metrics()
    metrics.loaded("f" * 64, REFERENCE)
    text = metrics.text().decode()
    assert 'sella_refusals_total{reason="queue_full"} 0.0' in text
    assert 'sella_requests_total{outcome="ok",route="/rank"} 0.0' in text
    assert 'sella_reference_bin_total{bin="9",bundle="ffffffffffff",of="score"} 0.0' in text
    assert "sella_drift_psi{" not in text  # nothing to tell it from yet


async def test_refusals_are_counted_by_reason_and_the_queue_returns_to_zero(bundle: Bundle, echo: EchoEngine) -> None:
    service = collaborators(bundle, echo, batches_in_flight=1)
    client = client_of(service)
    echo.gate.clear()
    body = {"user_id": "u1", "candidates": ["i1"]}
    calls = [
        asyncio.create_task(client.post("/rank", json=body, headers={"x-request-timeout-ms": "80"})) for _ in range(6)
    ]
    await asyncio.sleep(0.04)
    assert value(service.metrics, "sella_queue_tokens") == service.bundles.current.batcher.waiting_tokens > 0
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
    while not service.bundles.current.batcher.waiting_tokens:
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
