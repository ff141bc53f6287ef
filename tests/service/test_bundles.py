"""Changes of bundles with engines that compute at once: roles, routing, refusals, draining."""

import asyncio
import gc
import json
import os
import shutil
import weakref
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest

from service.bundles import memory
from service.bundles.registry import place_of
from service.collaborators import Collaborators
from service.engines.protocol import EngineBrokenError, EngineState, Outcome, ScoreJob
from tests.service.bundles import RANK, Family, give, make_family, roles, until
from tests.service.conftest import client_of, collaborators
from tests.service.echo import EchoEngine

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def later() -> EchoEngine:
    return EchoEngine()


@pytest.fixture
def service(family: Family, echo: EchoEngine, later: EchoEngine) -> Collaborators:
    return collaborators(family.first, echo, later, EchoEngine(), EchoEngine())


@pytest.fixture
async def client(service: Collaborators) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(service) as client:
        yield client
    await service.changes.close()
    await service.changes.free()


def value(service: Collaborators, name: str, **labels: str) -> float:
    return service.metrics.registry.get_sample_value(name, labels) or 0.0


async def rank(client: httpx.AsyncClient, user: str = "u3") -> str:
    answer = await client.post("/rank", json={**RANK, "user_id": user})
    assert answer.status_code == 200, answer.text
    bundle_id: str = answer.json()["bundle_id"]
    return bundle_id


async def test_another_language_model_takes_over_and_the_old_one_is_freed_when_nobody_holds_it(
    client: httpx.AsyncClient, service: Collaborators, family: Family, echo: EchoEngine, later: EchoEngine
) -> None:
    echo.gate.clear()
    begun = asyncio.create_task(rank(client))
    await until(lambda: bool(echo.batches))
    state = (await give(client, family.other)).json()
    assert [one["role"] for one in state["roles"]] == ["current"] and state["draining"] == [family.first.id]
    assert state["change"]["outcome"] == "switched"
    assert await rank(client) == family.other.id and later.batches
    await asyncio.sleep(0.02)
    assert not begun.done() and not echo.closed  # a request that began before ends with its own bundle
    echo.gate.set()
    assert await begun == family.first.id
    await until(lambda: echo.closed)
    assert not later.closed
    assert value(service, "sella_bundle_changes_total", outcome="switched") == 1
    assert value(service, "sella_bundle_change_seconds_count") == 1
    merged_id = family.other.manifest.backbone.merged_id
    assert value(service, "sella_bundle_info", merged_id=merged_id, bundle_id=family.other.id, role="current") == 1
    assert service.metrics.text().count(b"sella_bundle_info{") == 1


async def test_bundles_of_equal_weights_share_one_engine_and_one_queue(
    client: httpx.AsyncClient, service: Collaborators, family: Family, echo: EchoEngine
) -> None:
    first = service.bundles.current
    assert (await give(client, family.alike)).status_code == 200
    assert service.bundles.current.engine is echo and service.bundles.current.batcher is first.batcher
    await until(lambda: not service.changes.draining)
    assert echo.attached == [family.alike.id, f"-{family.first.id}"] and not echo.closed
    await rank(client)
    assert {job.bundle_id for job in echo.batches[-1] if hasattr(job, "bundle_id")} == {family.alike.id}


async def test_a_canary_gets_its_users_and_becomes_current_without_being_loaded_again(
    client: httpx.AsyncClient, service: Collaborators, family: Family, later: EchoEngine
) -> None:
    assert (await give(client, family.other, "canary", share=0.4)).status_code == 200
    users = [f"u{number}" for number in range(20)]
    got = [await rank(client, user) for user in users]
    expected = [family.other.id if place_of(user, family.other.id) < 0.4 else family.first.id for user in users]
    assert got == expected and len(set(got)) == 2
    assert got == [await rank(client, user) for user in users]
    readiness = (await client.get("/readyz")).json()
    assert readiness["bundle_id"] == family.first.id
    assert [(one["role"], one["share"]) for one in readiness["beside"]] == [("canary", 0.4)]

    later.state = EngineState.RESTARTING  # its users are answered by the current one meanwhile
    assert {await rank(client, user) for user in users} == {family.first.id}
    assert value(service, "sella_canary_fallbacks_total") == expected.count(family.other.id)
    later.state = EngineState.READY

    assert (await give(client, family.other, "canary", share=1.0)).json()["roles"][1]["share"] == 1.0
    engine = service.bundles.roles["canary"].handle.engine  # type: ignore[index]
    await give(client, family.other)
    assert service.bundles.current.engine is engine is later
    assert await roles(client) == {"current": family.other.id}


async def test_a_role_is_ended_but_never_the_current_one(
    client: httpx.AsyncClient, family: Family, later: EchoEngine
) -> None:
    await give(client, family.other, "shadow")
    assert set(await roles(client)) == {"current", "shadow"}
    assert (await client.delete("/admin/bundle/shadow")).status_code == 200
    await until(lambda: later.closed)
    for role in ("shadow", "current", "nobody"):
        assert (await client.delete(f"/admin/bundle/{role}")).status_code == 422


async def test_a_shadow_scores_the_same_requests_and_no_client_sees_it(
    client: httpx.AsyncClient, service: Collaborators, family: Family, later: EchoEngine
) -> None:
    await give(client, family.other, "shadow", share=1.0)
    for _ in range(3):
        assert await rank(client) == family.first.id
        await until(lambda: service.shadow._task is None or service.shadow._task.done())
    assert value(service, "sella_shadow_scored_total") == 3
    bundle = family.other.id[:12]
    assert value(service, "sella_shadow_difference_count", bundle=bundle) == 3 * len(RANK["candidates"])
    assert value(service, "sella_shadow_difference_sum", bundle=bundle) > 0  # other tables, other scores
    later.error = RuntimeError("out of order")
    await rank(client)
    await until(lambda: value(service, "sella_shadow_dropped_total") == 1)


async def test_a_shadow_steps_back_where_others_wait(
    client: httpx.AsyncClient, service: Collaborators, family: Family, echo: EchoEngine, later: EchoEngine
) -> None:
    await give(client, family.other, "shadow", share=1.0)
    echo.gate.clear()
    waiting = asyncio.create_task(rank(client))
    await until(lambda: not service.bundles.current.batcher.idle)
    later.batches.clear()
    service.shadow.offer([], lambda *_: pytest.fail("it began"))  # type: ignore[arg-type]
    assert value(service, "sella_shadow_dropped_total") == 1 and not later.batches
    echo.gate.set()
    await waiting


async def test_what_cannot_be_served_is_refused_and_the_old_one_goes_on(
    client: httpx.AsyncClient,
    service: Collaborators,
    family: Family,
    later: EchoEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refused(bundle: str, status: int, code: str, says: str) -> None:
        answer = await give(client, bundle)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
        assert says in answer.json()["error"]["message"]
        assert await rank(client) == family.first.id
        change = (await client.get("/admin/bundle")).json()["change"]
        assert change["outcome"] == "refused" and says in change["reason"]

    broken = shutil.copytree(family.other.folder, family.folder / "broken")
    with (broken / "semantic.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    shutil.copytree(family.other.folder, tmp_path / "outside")
    (family.folder / "link").symlink_to(tmp_path / "outside")
    try:
        await refused("broken", 422, "bundle_refused", "semantic.safetensors: altered")
        await refused("link", 422, "bundle_refused", "not inside the bundle folder")
        await refused(str(tmp_path / "outside"), 422, "bundle_refused", "not inside the bundle folder")
        await refused("../../../etc", 422, "bundle_refused", "not inside the bundle folder")
        await refused("nothing", 422, "bundle_refused", "is")
        monkeypatch.setattr(memory, "host_memory", lambda: (2**20, 2**30))
        await refused("other", 507, "bundle_too_large", "GiB")
        monkeypatch.undo()

        async def never() -> None:
            raise EngineBrokenError("backbone other: its weights are not those")

        monkeypatch.setattr(later, "ready", never)
        await refused("other", 422, "bundle_refused", "its weights are not those")
        assert later.closed
    finally:
        shutil.rmtree(broken)
        (family.folder / "link").unlink()
    assert value(service, "sella_bundle_changes_total", outcome="refused") == 7
    assert value(service, "sella_bundle_changes_total", outcome="switched") == 0


async def test_one_change_runs_at_a_time_and_goes_on_without_its_client(
    client: httpx.AsyncClient,
    service: Collaborators,
    family: Family,
    later: EchoEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = asyncio.Event()
    monkeypatch.setattr(later, "ready", loaded.wait)
    answer = await give(client, family.other, wait=False)
    assert answer.status_code == 202 and answer.json()["change"]["outcome"] == "running"
    asking = asyncio.create_task(give(client, family.alike))
    second = await asking
    assert (second.status_code, second.json()["error"]["code"]) == (409, "change_running")
    assert (await client.delete("/admin/bundle/shadow")).status_code == 409
    assert await rank(client) == family.first.id
    loaded.set()
    await until(lambda: service.bundles.current.bundle_id == family.other.id)
    await until(lambda: not service.changes.draining)


async def test_a_change_that_the_end_of_the_service_meets_leaves_nothing(
    service: Collaborators, family: Family, echo: EchoEngine, later: EchoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(later, "ready", asyncio.Event().wait)
    async with client_of(service) as client:
        asking = asyncio.create_task(give(client, family.other))
        await until(lambda: service.changes.last is not None and "language model" in service.changes.last.step)
        await service.changes.close()
        assert (await asking).status_code == 422
    assert later.closed
    await service.changes.free()
    assert echo.closed


async def test_a_bundle_is_followed_by_its_id(
    client: httpx.AsyncClient, service: Collaborators, family: Family
) -> None:
    await service.changes.follow(family.alike.id)
    assert await rank(client) == family.alike.id
    await service.changes.follow(family.alike.id)
    with pytest.raises(Exception, match="is not in"):
        await service.changes.follow("f" * 64)
    assert b'sella_bundle_changes_total{outcome="refused"} 1.0' in service.metrics.text()
    assert await rank(client) == family.alike.id


async def test_a_ranking_tells_apart_what_no_probability_does(
    client: httpx.AsyncClient, echo: EchoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = echo.score

    async def far(jobs: Sequence[ScoreJob]) -> list[Outcome]:
        outcomes = await compute(jobs)
        return [one if isinstance(one, Exception) else one + np.float32(1000) for one in outcomes]

    monkeypatch.setattr(echo, "score", far)
    answer = (await client.post("/rank", json=RANK)).json()["results"]
    turned = (await client.post("/rank", json={**RANK, "candidates": RANK["candidates"][::-1]})).json()["results"]
    assert {one["score"] for one in answer} == {one["raw_score"] for one in answer} == {1.0}
    assert [one["item_id"] for one in answer] == [one["item_id"] for one in turned]


async def test_a_bundle_that_is_freed_leaves_no_table_behind_without_the_collector(
    client: httpx.AsyncClient, service: Collaborators, family: Family
) -> None:
    """What serves is frozen, so a circle of references would never be freed."""
    first = [weakref.ref(part) for part in (service.bundles.current.tables, service.bundles.current.assembler)]
    await rank(client)
    gc.freeze()
    gc.disable()
    try:
        for bundle in (family.other, family.alike):
            await give(client, bundle)
            await rank(client)
            await until(lambda: not service.changes.draining)
            frozen = gc.get_freeze_count()
            assert frozen > 10_000 and not any(part() for part in first)
            handle = service.bundles.current
            first = [weakref.ref(part) for part in (handle.tables, handle.assembler)]
            del handle
    finally:
        gc.enable()
        gc.unfreeze()


async def test_shares_that_make_no_sense_are_refused(client: httpx.AsyncClient, family: Family) -> None:
    for role, share in [("canary", None), ("canary", 0), ("canary", 1.5), ("current", 0.5), ("shadow", -1)]:
        assert (await give(client, family.other, role, share=share)).status_code == 422
    assert (await give(client, family.first, "canary", share=0.5)).status_code == 422  # it is the current one


async def test_no_path_is_an_error_of_ours(client: httpx.AsyncClient) -> None:
    for path in ("", ".", "..", "~", "x" * 4096, "a/" * 2000, "a\0b", "\ud800", "夜", "first/manifest.json"):
        body = json.dumps({"bundle": path}).encode()
        answer = await client.post("/admin/bundle", content=body, headers={"content-type": "application/json"})
        assert answer.status_code in {400, 422}, (path, answer.text)


@pytest.mark.parametrize("name", ["manifest.json", "items.parquet", "extra"])
async def test_a_pipe_in_a_bundle_is_refused_and_nobody_waits_for_its_writer(
    client: httpx.AsyncClient, family: Family, name: str
) -> None:
    broken = family.alike.folder.with_name(f"pipe-{name}")
    shutil.copytree(family.alike.folder, broken)
    (broken / name).unlink(missing_ok=True)
    os.mkfifo(broken / name)
    try:
        async with asyncio.timeout(60):
            answer = await client.post("/admin/bundle", json={"bundle": broken.name})
        assert answer.status_code == 422 and name in answer.json()["error"]["message"]
    finally:
        shutil.rmtree(broken)
