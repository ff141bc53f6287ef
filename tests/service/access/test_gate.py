"""Who may call what, through the whole application; no body is read before that is clear."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from fastapi import APIRouter
from starlette.routing import Route
from structlog.testing import capture_logs

from models.loading import Bundle
from service.access.gate import FAILURE_RATE, OPEN_ROUTES, OPERATOR_ROUTES, Access, Need, is_loopback, need_of
from service.access.keys import KeyFileError
from service.app import create_app
from service.collaborators import Collaborators
from tests.service.conftest import collaborators
from tests.service.echo import EchoEngine
from tests.service.test_http import GOOD, assert_error

pytestmark = pytest.mark.anyio

API, SLOW, ADMIN = "api-key-0123456789", "slow-key-0123456789", "admin-key-0123456789"


async def done() -> None: ...


@pytest.fixture
def keyed(bundle: Bundle, tmp_path: Path) -> Collaborators:
    api, admin = tmp_path / "api", tmp_path / "admin"
    api.write_text(f"shop:{API}\nslow:{SLOW}:0.5\n")
    admin.write_text(f"oncall:{ADMIN}\n")
    for path in (api, admin):
        path.chmod(0o600)
    return collaborators(bundle, EchoEngine(), api_keys_file=api, admin_keys_file=admin, rate_burst_s=2)


def client_of(service: Collaborators) -> httpx.AsyncClient:
    """A client of an application that has routes of both kinds."""
    app = create_app(service)
    router = APIRouter(prefix="/admin", tags=["admin"])
    router.add_api_route("/check", done, methods=["POST"])
    forget = APIRouter()
    forget.add_api_route("/forget/{user_id}", done, methods=["DELETE"])
    for one in (router, forget):
        app.include_router(one)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://sella")


@pytest.fixture
async def client(keyed: Collaborators) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(keyed) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("headers", [bearer(API), {"authorization": f"bearer  {API} "}, {"x-api-key": API}])
async def test_a_key_opens_the_scoring_routes(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    with capture_logs() as logs:
        assert (await client.post("/rank", json=GOOD, headers=headers)).status_code == 200
    assert [one["key"] for one in logs if one["event"] == "scored"] == ["shop"]
    both = {**headers, "x-api-key": API}
    assert (await client.post("/rank", json=GOOD, headers=both)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ([], "missing"),
        ([("x-api-key", "")], "missing"),
        ([("authorization", "Bearer")], "missing"),
        ([("x-api-key", API[:-1])], "unknown"),
        ([("x-api-key", "clé-clé-clé-clé-clé".encode("latin-1"))], "unknown"),
        ([("authorization", f"Basic {API}")], "malformed"),
        ([("authorization", API)], "malformed"),
        ([("x-api-key", API), ("x-api-key", ADMIN)], "malformed"),
        ([("x-api-key", API), ("authorization", f"Bearer {SLOW}")], "malformed"),
        ([("authorization", f"Bearer {SLOW}"), ("authorization", f"Bearer {API}")], "malformed"),
    ],
)
async def test_without_a_known_key_it_is_401_and_counted_once(
    client: httpx.AsyncClient, keyed: Collaborators, headers: list[tuple[str, str | bytes]], reason: str
) -> None:
    with capture_logs() as logs:
        response = await client.post("/rank", json=GOOD, headers=headers)
    assert_error(response, 401, "unauthorized")
    assert response.headers["www-authenticate"].startswith("Bearer")
    value = keyed.metrics.registry.get_sample_value
    assert value("sella_unauthorized_total", {"reason": reason}) == 1
    assert value("sella_requests_total", {"route": "/rank", "outcome": "invalid"}) == 1
    for key in (API, SLOW, ADMIN):
        assert key not in response.text + str(logs) + keyed.metrics.text().decode()


async def test_each_route_asks_for_what_it_should(client: httpx.AsyncClient) -> None:
    async def status(method: str, path: str, key: str = "") -> int:
        headers = bearer(key) if key else {}
        return (await client.request(method, path, headers=headers)).status_code

    for path in OPEN_ROUTES:
        assert [await status(method, path) for method in ("GET", "HEAD")] == [200, 200]
    for path in OPERATOR_ROUTES:
        assert [await status("GET", path, key) for key in ("", API, ADMIN)] == [401, 200, 200]
    for method, path in (("POST", "/admin/check"), ("DELETE", "/forget/u1")):
        assert [await status(method, path, key) for key in ("", "x" * 20, API, ADMIN)] == [401, 401, 403, 200]
    assert await status("POST", "/score", ADMIN) == 415  # an admin key passes the gate everywhere
    # What is not known is closed, and tells nothing to somebody without a key.
    for path in ("/nothing", "/redoc", "/docs/oauth2-redirect", "//metrics", "/metrics/", "/admin", "/admin/other"):
        assert await status("GET", path) == 401
    assert await status("GET", "/nothing", API) == 404


@pytest.mark.parametrize("path", ["/admin/check", "/%61dmin/check", "/admin/../admin/check", "/admin//check"])
async def test_no_spelling_of_a_path_gets_around_the_admin_key(client: httpx.AsyncClient, path: str) -> None:
    response = await client.post(path, headers=bearer(API))
    assert response.status_code in {403, 404}


async def test_a_stranger_is_told_no_more_than_whether_it_is_ready(client: httpx.AsyncClient) -> None:
    assert (await client.get("/readyz")).json() == {"ready": True}
    assert (await client.get("/readyz", headers=bearer("x" * 20))).json() == {"ready": True}
    assert "bundle_id" in (await client.get("/readyz", headers=bearer(API))).json()


async def test_the_metrics_port_asks_for_no_key_and_has_nothing_else(keyed: Collaborators) -> None:
    access = replace(Access.open(keyed.settings, keyed.log), metrics_port=9100)
    app = create_app(keyed, access=access)

    async def status(port: int, method: str, path: str) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"http://sella:{port}") as client:
            response = await client.request(method, path, json=GOOD)
            assert path != "/readyz" or ("engine" in response.json()) == (port == 9100)
            return response.status_code

    for path in OPEN_ROUTES | OPERATOR_ROUTES:
        assert await status(9100, "GET", path) == 200
        assert await status(8000, "GET", path) == (200 if path in OPEN_ROUTES else 401)
    for method, path in (("POST", "/rank"), ("DELETE", "/users/u1"), ("GET", "/admin/bundle"), ("GET", "/nothing")):
        assert await status(9100, method, path) == 404
    # Rendering takes the loop's time, so that even there it has a rate.
    statuses = [await status(9100, "GET", "/metrics") for _ in range(60)]
    assert set(statuses) == {200, 429}


async def test_strangers_are_told_401_so_often_and_cannot_fill_the_log(
    client: httpx.AsyncClient, keyed: Collaborators
) -> None:
    with capture_logs() as logs:
        statuses = [(await client.post("/rank", json=GOOD)).status_code for _ in range(300)]
        assert (await client.post("/rank", json=GOOD, headers=bearer(API))).status_code == 200  # it is not shut out
    assert statuses[0] == 401 and statuses[-1] == 429
    assert 10 * FAILURE_RATE <= statuses.count(401) < 200
    assert len([one for one in logs if one["event"] == "refused"]) < 60
    assert keyed.metrics.registry.get_sample_value("sella_unauthorized_total", {"reason": "missing"}) == 300


async def test_the_document_says_how_a_key_is_sent(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json", headers=bearer(API))).json()
    assert {one["type"] for one in schema["components"]["securitySchemes"].values()} == {"http", "apiKey"}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) == (path not in OPEN_ROUTES), path


async def test_a_refused_body_is_never_read(client: httpx.AsyncClient) -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    headers = {"content-type": "application/json", **bearer("x" * 20)}
    assert (await client.post("/rank", content=body(), headers=headers)).status_code == 401


async def test_a_key_over_its_rate_is_429_and_the_others_are_not(
    client: httpx.AsyncClient, keyed: Collaborators
) -> None:
    assert (await client.post("/rank", json=GOOD, headers=bearer(SLOW))).status_code == 200
    response = await client.post("/rank", json=GOOD, headers=bearer(SLOW))
    assert_error(response, 429, "rate_limited")
    assert 1 <= int(response.headers["retry-after"]) <= 2
    for _ in range(5):
        assert (await client.post("/rank", json=GOOD, headers=bearer(API))).status_code == 200
        assert (await client.get("/livez", headers=bearer(SLOW))).status_code == 200
    value = keyed.metrics.registry.get_sample_value
    assert value("sella_rate_limited_total") == 1
    assert value("sella_refusals_total", {"reason": "rate_limit"}) == 1
    assert value("sella_requests_total", {"route": "/rank", "outcome": "refused"}) == 1


async def test_without_keys_the_rate_is_of_an_address(bundle: Bundle) -> None:
    app = create_app(collaborators(bundle, EchoEngine(), rate_limit=1, rate_burst_s=1))

    async def status(address: str) -> int:
        transport = httpx.ASGITransport(app, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://sella") as client:
            return (await client.post("/rank", json=GOOD)).status_code

    assert [await status(one) for one in ("10.0.0.1", "10.0.0.1", "10.0.0.2")] == [200, 429, 200]
    # One IPv6 client owns a whole /64, and an IPv4 address may come mapped.
    assert [await status(one) for one in ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1")] == [200, 429, 200]
    assert await status("::ffff:10.0.0.1") == 429


async def test_without_files_all_is_open_on_loopback(bundle: Bundle) -> None:
    async with client_of(collaborators(bundle, EchoEngine())) as client:
        assert (await client.post("/rank", json=GOOD)).status_code == 200
        assert (await client.post("/admin/check")).status_code == 200
        assert (await client.delete("/forget/u1")).status_code == 200


async def test_api_keys_without_admin_keys_close_administration(keyed: Collaborators, bundle: Bundle) -> None:
    path = keyed.settings.api_keys_file
    for settings in ({"api_keys_file": path}, {"host": "0.0.0.0", "allow_anonymous": True}):
        async with client_of(collaborators(bundle, EchoEngine(), **settings)) as client:
            for headers in ({}, bearer(API)):
                response = await client.post("/admin/check", headers=headers)
                assert_error(response, 403, "forbidden")
                assert "SELLA_ADMIN_KEYS_FILE" in response.json()["error"]["message"]


async def test_an_address_that_others_reach_needs_keys(keyed: Collaborators, bundle: Bundle) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        exposed = collaborators(bundle, EchoEngine(), host=host)
        with pytest.raises(KeyFileError, match=r"SELLA_API_KEYS_FILE, or say SELLA_ALLOW_ANONYMOUS=true"):
            create_app(exposed)
        assert Access.open(exposed.settings.model_copy(update={"allow_anonymous": True}), exposed.log)
        copy = exposed.settings.model_copy(update={"api_keys_file": keyed.settings.api_keys_file})
        assert not Access.open(copy, exposed.log).anonymous


def test_loopback_is_recognised() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost", "LOCALHOST")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.example.org", "")))


def test_a_route_that_nobody_has_listed_needs_a_key() -> None:
    router = APIRouter()
    router.add_api_route("/new", done)
    assert need_of(router.routes[0], "GET") is Need.KEY
    assert need_of(None, "GET") is Need.KEY


def test_the_applications_own_routes_ask_for_what_they_should(keyed: Collaborators) -> None:
    needs = {
        (method, route.path): need_of(route, method)
        for route in create_app(keyed).routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    expected = dict.fromkeys(OPEN_ROUTES, Need.NOTHING)
    expected |= dict.fromkeys(("/score", "/rank", "/interactions", *OPERATOR_ROUTES), Need.KEY)
    for (method, path), need in needs.items():
        admin = method == "DELETE" or path.startswith("/admin")
        assert need is (Need.ADMIN_KEY if admin else expected[path]), (method, path)
    assert expected.keys() <= {path for _, path in needs}
