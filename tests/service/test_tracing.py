"""Traces: a span for each request and its legs, in the caller's trace, and nothing at all where they are off."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import structlog
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from models.loading import Bundle
from service.app import create_app
from service.collaborators import Collaborators
from service.settings import SettingsError, load_settings
from service.tracing import Traces
from tests.service.echo import EchoEngine

pytestmark = pytest.mark.anyio

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BODY = {"user_id": "secret-user", "candidates": ["i1", {"item_id": "new", "title": "Secret title"}]}


@pytest.fixture
def exported() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def client(service: Collaborators, exported: InMemorySpanExporter) -> Iterator[httpx.AsyncClient]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exported))
    transport = httpx.ASGITransport(create_app(service, traces=Traces(provider)))
    yield httpx.AsyncClient(transport=transport, base_url="http://sella")
    provider.shutdown()


def spans(exported: InMemorySpanExporter) -> tuple[ReadableSpan, list[ReadableSpan]]:
    found = exported.get_finished_spans()
    [request] = [span for span in found if span.name.startswith(("POST", "GET", "_OTHER"))]
    return request, [span for span in found if span is not request]


async def test_a_request_and_its_legs_are_in_the_callers_trace(
    client: httpx.AsyncClient, exported: InMemorySpanExporter
) -> None:
    answer = await client.post("/rank", json=BODY, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    assert answer.status_code == 200
    request, legs = spans(exported)
    assert request.name == "POST /rank"
    assert request.context is not None and request.parent is not None
    assert (f"{request.context.trace_id:032x}", f"{request.parent.span_id:016x}") == (TRACE, PARENT)
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/rank",
        "http.response.status_code": 200,
        "sella.request_id": answer.json()["request_id"],
    }
    # The new title is distilled first: a pass through queue and forward of its own.
    assert [leg.name for leg in legs] == ["lookup", "assemble", "queue", "forward", "assemble", "queue", "forward"]
    for leg in legs:
        assert leg.parent is not None and leg.parent.span_id == request.context.span_id
        assert request.start_time <= leg.start_time + 1_000_000 and leg.end_time <= request.end_time + 1_000_000
    told = answer.json()["timings_ms"]
    for name in ("lookup", "assemble", "queue", "forward"):
        spent = sum(leg.end_time - leg.start_time for leg in legs if leg.name == name) / 1e6
        assert spent == pytest.approx(told[name], abs=0.05)


async def test_no_span_names_a_user_or_a_title_or_what_a_client_invents(
    client: httpx.AsyncClient, exported: InMemorySpanExporter, service: Collaborators, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise KeyError("secret-user")

    await client.post("/rank", json=BODY)
    await client.delete("/users/secret-user")
    await client.request("INVENTED", "/secret-user")
    monkeypatch.setattr(type(service.bundles.current.store), "look_up", broken)
    assert (await client.post("/rank", json=BODY)).status_code == 500
    text = "".join(span.to_json() for span in exported.get_finished_spans())
    assert "secret-user" not in text and "Secret title" not in text and "INVENTED" not in text
    names = [span.name for span in exported.get_finished_spans()]
    assert "_OTHER unmatched" in names and "DELETE /users/{user_id:path}" in names
    failed = [span for span in exported.get_finished_spans() if not span.status.is_ok and span.name == "POST /rank"]
    assert len(failed) == 1


async def test_what_is_logged_names_the_trace(
    client: httpx.AsyncClient, service: Collaborators, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    look_up = service.bundles.current.store.look_up

    async def watched(*arguments: object) -> object:
        seen.append(structlog.contextvars.get_contextvars().get("trace_id"))
        return await look_up(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(service.bundles.current.store, "look_up", watched)
    await client.post("/rank", json=BODY, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    await client.post("/rank", json=BODY, headers={"traceparent": "nonsense"})
    assert seen[0] == TRACE
    assert isinstance(seen[1], str) and len(seen[1]) == 32 and seen[1] != TRACE


def test_nothing_of_tracing_is_imported_where_traces_are_off(root: Path) -> None:
    # redis-py imports the metrics of OpenTelemetry where it is installed: spans and their way out are looked for.
    tracing = ("service.tracing", "opentelemetry.sdk.trace", "opentelemetry.exporter")
    code = f"import service.cli, sys; print([name for name in sys.modules if name.startswith({tracing})])"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_an_address_that_is_none_is_refused(bundle: Bundle) -> None:
    with pytest.raises(SettingsError, match="SELLA_TRACING"):
        load_settings(bundle=bundle.folder, tracing="collector:4318")


async def test_an_engine_that_fails_leaves_the_legs_up_to_there(
    client: httpx.AsyncClient, exported: InMemorySpanExporter, echo: EchoEngine
) -> None:
    echo.error = RuntimeError("secret")
    assert (await client.post("/rank", json={"user_id": "u1", "candidates": ["i1"]})).status_code == 503
    request, legs = spans(exported)
    assert not request.status.is_ok
    assert [leg.name for leg in legs] == ["lookup", "assemble"]
