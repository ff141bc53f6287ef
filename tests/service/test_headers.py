"""Every answer carries the security headers, names no server, and tells nothing of the inside."""

import httpx
import pytest

from service.collaborators import Collaborators
from service.headers import SECURITY_HEADERS
from tests.service.test_http import GOOD

pytestmark = pytest.mark.anyio


async def test_every_answer_carries_them(client: httpx.AsyncClient) -> None:
    answers = [
        await client.post("/rank", json=GOOD),
        await client.post("/rank", json={}),
        await client.post("/rank", content=b"x"),
        await client.get("/nothing"),
        await client.get("/rank"),
        await client.get("/metrics"),
        await client.get("/livez"),
    ]
    assert [one.status_code for one in answers] == [200, 422, 415, 404, 405, 200, 200]
    for answer in answers:
        assert {name: answer.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
        assert "server" not in answer.headers


async def test_the_page_of_documentation_may_load_what_it_names_and_no_more(client: httpx.AsyncClient) -> None:
    answer = await client.get("/docs")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    for source in ("https://cdn.jsdelivr.net/npm/swagger-ui-dist", "https://fastapi.tiangolo.com/img/favicon.png"):
        assert source in answer.text
        assert "/".join(source.split("/")[:3]) in policy


async def test_a_fault_of_ours_carries_them_and_no_trace(
    client: httpx.AsyncClient, service: Collaborators, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(type(service.bundles.current.store), "look_up", broken)
    answer = await client.post("/rank", json=GOOD)
    assert answer.status_code == 500
    assert {name: answer.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
    for word in ("secret", "Traceback", "RuntimeError", ".py"):
        assert word not in answer.text


@pytest.mark.parametrize("method", ["TRACE", "OPTIONS", "CONNECT", "PATCH", "PUT", "HEAD", "PROPFIND", "GETT"])
async def test_odd_methods_are_405(client: httpx.AsyncClient, method: str) -> None:
    answer = await client.request(method, "/rank", json=GOOD)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"


async def test_two_ways_to_tell_a_length_are_refused(client: httpx.AsyncClient) -> None:
    headers = {"content-length": "3", "transfer-encoding": "chunked", "content-type": "application/json"}
    answer = await client.post("/rank", content=b"{}", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_http")
    assert answer.headers["connection"] == "close"
