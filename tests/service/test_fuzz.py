"""Requests generated from the OpenAPI document: none gets a 500, and every answer is as documented."""

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from models.loading import Bundle
from service.app import create_app
from service.connections import Connections
from tests.service.conftest import collaborators
from tests.service.echo import EchoEngine


@pytest.fixture(scope="module")
def url(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The application with the echo engine, on a real port in a thread."""
    log = tmp_path_factory.mktemp("fuzz") / "interactions.sqlite"
    service = collaborators(bundle, EchoEngine(), interactions=log)
    http: Any = Connections(service.settings, 100, service.metrics.connections).protocol
    config = uvicorn.Config(create_app(service), port=0, log_config=None, access_log=False, http=http)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


# `make fuzz` sends ten thousand requests to each route.
SCALE = float(os.environ.get("FUZZ_SCALE", "1"))

CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = [
    ("POST", "/score", 160),
    ("POST", "/rank", 160),
    ("POST", "/interactions", 160),
    ("DELETE", "/users/{user_id}", 40),
    ("POST", "/admin/bundle", 160),
    ("DELETE", "/admin/bundle/{role}", 10),
    ("GET", "/admin/bundle", 6),
    ("GET", "/livez", 6),
    ("GET", "/readyz", 6),
]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
@pytest.mark.parametrize(("method", "route", "examples"), OPERATIONS)
def test_no_generated_request_gets_a_500(
    url: str, method: str, route: str, examples: int, mode: GenerationMode
) -> None:
    operation = schemathesis.openapi.from_url(f"{url}/openapi.json")[route][method]
    statuses: set[int] = set()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=round(SCALE * examples / 2),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def send(case: schemathesis.Case[Any]) -> None:
        response = case.call()
        case.validate_response(response, checks=CHECKS)
        # A generated deadline of a millisecond may well pass: 504 is then the right answer.
        allowed = {200, 202, 400, 409, 413, 415, 422, 504} | ({404} if method == "DELETE" else set())
        assert response.status_code in allowed
        statuses.add(response.status_code)

    try:
        send()
    except Unsatisfiable:  # a route without parameters, or with any text in its path, has no negative requests
        assert method != "POST"
    else:
        assert method == "GET" or statuses & {200, 422}
