"""Logs as they are written: one form, the request's id, and nobody's name or title."""

import asyncio
import gc
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from models.loading import Bundle
from service.app import create_app
from service.engines.protocol import EngineUnavailableError, JobFailedError
from service.logs import WAITING_LINES, PatientHandler, configure_logs
from service.settings import Settings
from tests.service.conftest import client_of, collaborators
from tests.service.echo import EchoEngine

pytestmark = pytest.mark.anyio

USER, TITLE = "secret-user 夜/..%2F", "Secret title 'quoted' {brace} %s"
WORDS = ("secret-user", "Secret title", "夜")

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Iterator[Lines]:
    """Parse what was logged so far. Logging is as it was before afterwards."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    root.handlers[:], root.level = before
    structlog.reset_defaults()


def configured(bundle: Bundle, **settings: object) -> structlog.stdlib.BoundLogger:
    return configure_logs(Settings(bundle=bundle.folder, log_format="json", **settings))  # type: ignore[arg-type]


async def test_no_route_writes_a_user_or_a_title(
    bundle: Bundle, echo: EchoEngine, written: Lines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    configured(bundle)
    service = collaborators(bundle, echo, interactions=tmp_path / "log.sqlite")
    await service.interactions.start()
    new = {"item_id": "new", "title": TITLE}
    rank = {"user_id": USER, "candidates": ["i1", new], "history": [new]}
    score = {"pairs": [{"user_id": USER, "item_id": "new", "title": TITLE}]}
    event = {"event_id": f"e {USER}", "user_id": USER, "item_id": TITLE, "timestamp": 1.7e9, "label": True}
    odd: tuple[Exception, ...] = (EngineUnavailableError("gone"), JobFailedError("bad"), RuntimeError("odd"))
    async with client_of(service) as client:
        # Every route that there is, with every kind of request.
        for path, methods in create_app(service).openapi()["paths"].items():
            for method in methods:
                for body in (rank, score, {"interactions": [event]}, {**rank, TITLE: USER}, {"user_id": [USER, TITLE]}):
                    url = path.replace("{user_id}", USER)
                    for params in ({}, {"user": USER}):
                        await client.request(method, url, json=body, params=params)
        for error in odd:
            echo.error = error
            assert (await client.post("/rank", json=rank)).status_code == 503
        echo.error = None
        late = {"x-request-timeout-ms": "1"}
        echo.gate.clear()
        assert (await client.post("/rank", json=rank, headers=late)).status_code == 504
        echo.gate.set()

        async def broken(*_: object) -> None:
            try:
                raise KeyError(USER)
            except KeyError as error:
                raise ValueError(f"no title {TITLE!r}") from error

        monkeypatch.setattr(type(service.bundles.current.store), "look_up", broken)
        failed = await client.post("/rank", json=rank)
        assert failed.status_code == 500
        assert not any(word in failed.text for word in WORDS)
    await service.interactions.close()
    lines = written()
    found = [line for line in lines if any(word in json.dumps(line, ensure_ascii=False) for word in WORDS)]
    assert found == []
    assert {line["event"] for line in lines} >= {"scored", "refused", "internal_error"}
    [fault] = [line for line in lines if line["event"] == "internal_error"]
    assert "KeyError" in fault["exception"] and "ValueError" in fault["exception"] and "broken" in fault["exception"]


async def test_a_librarys_record_has_the_requests_id_and_the_same_form(bundle: Bundle, written: Lines) -> None:
    log = configured(bundle)
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        log.info("ours")
        await asyncio.to_thread(logging.getLogger("some.library").warning, "theirs %s", 7)
    log.info("outside")
    ours, theirs, outside = written()
    assert (ours["event"], ours["request_id"], ours["level"]) == ("ours", "r1", "info")
    assert (theirs["event"], theirs["request_id"], theirs["level"]) == ("theirs 7", "r1", "warning")
    assert theirs["logger"] == "some.library" and theirs["timestamp"]
    assert "request_id" not in outside


async def test_concurrent_requests_log_each_its_own_id(
    bundle: Bundle, echo: EchoEngine, written: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured(bundle)
    service = collaborators(bundle, echo)
    look_up = service.bundles.current.store.look_up

    async def told(*arguments: Any) -> Any:
        await asyncio.sleep(0.01)
        logging.getLogger("some.library").warning("looked up")
        return await look_up(*arguments)

    monkeypatch.setattr(service.bundles.current.store, "look_up", told)
    async with client_of(service) as client:
        body = {"user_id": "u1", "candidates": ["i1"]}
        calls = [client.post("/rank", json=body, headers={"x-request-id": f"r{number}"}) for number in range(5)]
        await asyncio.gather(*calls)
    lines = written()
    for event in ("looked up", "scored"):
        assert sorted(line["request_id"] for line in lines if line["event"] == event) == [f"r{i}" for i in range(5)]


def test_a_task_that_nobody_awaits_does_not_quote_its_error(bundle: Bundle, written: Lines) -> None:
    configured(bundle)

    async def fails() -> None:
        raise KeyError(USER)

    async def forget() -> None:
        asyncio.get_running_loop().create_task(fails())
        await asyncio.sleep(0.01)
        gc.collect()

    asyncio.run(forget())  # not anyio's runner, which has a handler of its own
    [line] = written()
    assert line["event"] == "Task exception was never retrieved"
    assert "KeyError" in line["exception"]
    assert not any(word in str(line) for word in WORDS)


async def test_debugging_tells_messages(bundle: Bundle, written: Lines) -> None:
    log = configured(bundle, log_level="debug")
    try:
        raise KeyError(USER)
    except KeyError:
        log.exception("failed")
    [line] = written()
    assert USER in line["exception"]


class Pipe:
    """A pipe that nobody reads until it is asked to."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def read(self, until: bytes) -> bytes:
        found = b""
        while until not in found:
            found += os.read(self.reader, 1 << 16)
        return found


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    for one in (made.reader, made.writer):
        os.close(one)


def logger_to(pipe: Pipe) -> tuple[logging.Logger, PatientHandler]:
    log, handler = logging.Logger("patient"), PatientHandler(os.fdopen(pipe.writer, "w", closefd=False))
    log.addHandler(handler)
    return log, handler


def test_a_pipe_that_nobody_reads_stops_nobody_and_tells_afterwards_what_is_missing(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.logs.FLUSH_S", 0.2)
    log, handler = logger_to(pipe)
    began = time.monotonic()
    for number in range(WAITING_LINES + 2000):
        log.warning("%06d %s", number, "x" * 80)  # a pipe holds 64 kB
    handler.flush()
    assert time.monotonic() - began < 10
    text = pipe.read(b"lines_dropped").decode()
    numbers = [int(line[:6]) for line in text.splitlines() if line[:6].isdigit()]
    assert numbers == list(range(len(numbers)))  # of what was taken nothing is missing, and in order
    log.warning("after")
    assert b"after" in pipe.read(b"after")
    handler.flush()


def test_lines_are_written_before_the_end(pipe: Pipe) -> None:
    log, handler = logger_to(pipe)
    for number in range(100):
        log.warning("line %d", number)
    handler.flush()
    assert os.read(pipe.reader, 1 << 16).decode().splitlines() == [f"line {number}" for number in range(100)]
