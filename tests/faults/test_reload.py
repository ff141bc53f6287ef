"""Bundles change under load in a real service: nobody's request fails, no score is wrong, nothing stays behind."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from models.loading import Bundle
from tests.faults.load import Ask, asks_of, load_on
from tests.service.bundles import Family, make_family
from tests.service.test_supervised import alive
from tests.serving import Server, wait_for

USERS = ("u0", "u1", "u2", "nobody")
ITEMS = ("i1", "i2", "i3", "i39")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def server(family: Family) -> Iterator[Server]:
    server = Server(family.first.folder)
    try:
        wait_for(lambda: httpx.get(f"{server.url}/readyz").status_code == 200)
        yield server
    finally:
        server.clean_up()


def give(server: Server, bundle: Bundle | str, role: str = "current", **more: Any) -> httpx.Response:
    name = bundle if isinstance(bundle, str) else bundle.folder.name
    return httpx.post(f"{server.url}/admin/bundle", json={"bundle": name, "role": role, **more}, timeout=120)


def workers(server: Server) -> set[int]:
    return {child.pid for child in psutil.Process(server.process.pid).children()}


def served_by(server: Server, user: str = "u1") -> str:
    answer = httpx.post(f"{server.url}/rank", json={"user_id": user, "candidates": ["i1"]}, timeout=30)
    bundle_id: str = answer.raise_for_status().json()["bundle_id"]
    return bundle_id


def steady(server: Server, asks: list[Ask], seconds: float = 1.0) -> None:
    """Nothing but what these requests were answered before comes from whoever serves now."""
    with load_on(server.url, asks) as load:
        time.sleep(seconds)
    assert load.seen and not load.wrong and set(load.statuses()) == {200}


def test_every_kind_of_change_under_load_fails_no_request(server: Server, family: Family) -> None:
    first = asks_of(server.url, USERS, ITEMS)
    [old] = workers(server)
    with load_on(server.url, first) as load:
        # Other weights: a second worker beside, then the first one is gone.
        assert give(server, family.other).status_code == 200
        wait_for(lambda: not alive(old))
        # And back.
        assert give(server, family.first).status_code == 200
        # Equal weights: the same worker.
        wait_for(lambda: len(workers(server)) == 1)
        kept = workers(server)
        assert give(server, family.alike).status_code == 200
        assert workers(server) == kept
    assert set(load.statuses()) == {200}, load.statuses()
    other = asks_of(server.url, USERS, ITEMS)
    assert any(one.expected != two.expected for one, two in zip(first, other, strict=True))
    assert give(server, family.first).status_code == 200
    assert workers(server) == kept
    steady(server, first)  # the first bundle's scores, to 1e-5, out of a worker that has served three
    events = [json.loads(line)["event"] for line in server.log if '"bundle_' in line]
    assert events.count("bundle_switched") == 4
    wait_for(lambda: sum('"bundle_freed"' in line for line in server.log) == 4)
    assert server.end(signal.SIGTERM) == 0


def test_a_killed_worker_comes_back_with_all_its_bundles(server: Server, family: Family) -> None:
    first = asks_of(server.url, USERS, ITEMS)
    assert give(server, family.alike, "canary", share=1.0).status_code == 200
    alike = asks_of(server.url, USERS, ITEMS)
    assert served_by(server) == family.alike.id
    [pid] = workers(server)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
    wait_for(lambda: httpx.get(f"{server.url}/readyz").status_code == 200)
    steady(server, alike)
    assert httpx.delete(f"{server.url}/admin/bundle/canary").status_code == 200
    steady(server, first)


def test_what_is_broken_is_refused_under_load_and_nothing_changes(
    server: Server, family: Family, tmp_path: Path
) -> None:
    asks = asks_of(server.url, USERS, ITEMS)
    broken = shutil.copytree(family.other.folder, family.folder / "broken")
    (broken / "backbone" / "model.safetensors").write_bytes(b"")
    try:
        with load_on(server.url, asks) as load:
            before = workers(server)
            for bundle, status in (("broken", 422), (str(tmp_path), 422), ("nowhere", 422)):
                assert give(server, bundle).status_code == status
            assert workers(server) == before
    finally:
        shutil.rmtree(broken)
    assert not load.wrong and set(load.statuses()) == {200}
    assert served_by(server) == family.first.id


def test_files_that_change_under_a_served_bundle_change_no_score_and_end_nothing(
    family: Family, tmp_path: Path
) -> None:
    """Files are written over in place, as `cp` does, and then cut off: a mapped one would be SIGBUS."""
    folder = Path(shutil.copytree(family.first.folder, tmp_path / "served"))
    server = Server(folder)
    try:
        wait_for(lambda: httpx.get(f"{server.url}/readyz").status_code == 200)
        asks = asks_of(server.url, USERS, ITEMS)
        before = workers(server)
        files = [one for one in folder.rglob("*") if one.is_file()]
        for path in files:
            shutil.copyfile(family.other.folder / path.relative_to(folder), path)
        steady(server, asks)
        for path in files:
            os.truncate(path, 0)
        steady(server, asks)
        assert workers(server) == before
        assert served_by(server) == family.first.id
        assert server.end(signal.SIGTERM) == 0
    finally:
        server.clean_up()


def test_a_worker_killed_while_it_loads_is_a_refusal(server: Server, family: Family) -> None:
    asks = asks_of(server.url, USERS, ITEMS)
    [old] = workers(server)
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(give(server, family.other)))
    with load_on(server.url, asks) as load:
        asking.start()
        wait_for(lambda: "language model" in step(server))
        wait_for(lambda: len(workers(server)) == 2)
        [new] = workers(server) - {old}
        os.kill(new, signal.SIGKILL)
        asking.join()
    assert answers[0].status_code == 422, answers[0].text
    assert not load.wrong and set(load.statuses()) == {200}
    assert workers(server) == {old}


def test_sigterm_during_a_change_ends_cleanly(server: Server, family: Family) -> None:
    assert give(server, family.other, wait=False).status_code == 202
    wait_for(lambda: "language model" in step(server))
    started = workers(server)
    assert server.end(signal.SIGTERM) == 0
    assert not any(alive(pid) for pid in started)


def step(server: Server) -> str:
    state = httpx.get(f"{server.url}/admin/bundle").json()["change"]
    return "" if state is None else str(state["step"])
