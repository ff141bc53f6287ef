"""POST /interactions and DELETE /users over HTTP, and what they change in the next score."""

import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from service.collaborators import Collaborators
from service.engines.protocol import ScoreJob
from tests.service.conftest import client_of, collaborators
from tests.service.echo import EchoEngine
from tests.service.test_http import assert_error
from tests.tiny import tiny_bundle

pytestmark = pytest.mark.anyio


def told(event_id: str, **fields: Any) -> dict[str, Any]:
    return {"event_id": event_id, "user_id": "u1", "item_id": "i7", "label": True, "timestamp": time.time(), **fields}


async def post(client: httpx.AsyncClient, *events: dict[str, Any]) -> httpx.Response:
    return await client.post("/interactions", json={"interactions": list(events)})


async def rank(client: httpx.AsyncClient, user_id: str, **fields: Any) -> dict[str, Any]:
    response = await client.post("/rank", json={"user_id": user_id, "candidates": ["i1"], **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def in_prompt(service: Collaborators, item_id: str) -> bool:
    """Whether an item's title stood before the candidates in the last batch."""
    handle = service.bundles.current
    assert isinstance(handle.engine, EchoEngine)
    [job] = handle.engine.batches[-1]
    assert isinstance(job, ScoreJob)
    item = handle.tables.item(item_id)
    assert item is not None
    title, trunk = handle.assembler.title(item.title).token_ids, tuple(job.group.pack.trunk.token_ids)
    return any(trunk[place : place + len(title)] == tuple(title) for place in range(len(trunk)))


async def test_the_next_score_has_the_like_in_its_prompt(client: httpx.AsyncClient, recording: Collaborators) -> None:
    before = await rank(client, "u1")
    assert before["history"]["source"] == "bundle" and not in_prompt(recording, "i38")
    assert (await post(client, told("e1", item_id="i38"))).json()["accepted"] == 1
    after = await rank(client, "u1")
    assert after["history"]["source"] == "live" and in_prompt(recording, "i38")
    assert after["history"]["given"] == before["history"]["given"] + 1
    assert (await rank(client, "u1", history=["i2"]))["history"]["source"] == "request"
    assert not in_prompt(recording, "i38")


async def test_an_unknown_user_is_folded_in_from_likes(client: httpx.AsyncClient, recording: Collaborators) -> None:
    assert (await rank(client, "new/user"))["history"]["source"] == "none"
    await post(client, told("e1", user_id="new/user"), told("e2", user_id="new/user", item_id="gone"))
    answer = await rank(client, "new/user")
    assert answer["cold_user"] and in_prompt(recording, "i7")
    assert answer["history"] | {"titles_cut": 0} == {
        "source": "live",
        "given": 2,
        "used": 1,
        "dropped": 1,
        "titles_cut": 0,
        "titles_ignored": 0,
    }
    assert b"sella_live_histories_total 1.0" in recording.metrics.text()


async def test_a_late_like_stands_at_its_place(client: httpx.AsyncClient, recording: Collaborators) -> None:
    now = time.time()
    for event_id, item_id, age in (("a", "i7", 10), ("c", "i9", 0), ("b", "i8", 5), ("old", "i6", 9000 * 86400)):
        await post(client, told(event_id, user_id="n", item_id=item_id, timestamp=now - age))
    live = await recording.interactions.live(["n"])
    assert [like.item_id for like in live["n"].likes] == ["i6", "i7", "i8", "i9"]


async def test_batches_are_idempotent_and_conflicts_name_their_place(
    client: httpx.AsyncClient, recording: Collaborators
) -> None:
    shown, liked = told("e1", label=None), told("e2")
    assert (await post(client, shown, liked)).json()["accepted"] == 2
    assert (await post(client, shown, liked, liked)).json()["duplicates"] == 3
    outcome = {**shown, "label": 1}
    assert (await post(client, outcome, outcome)).json() | {"request_id": ""} == {
        "accepted": 1,
        "duplicates": 1,
        "forgotten": 0,
        "request_id": "",
    }
    response = await post(client, told("e3"), {**shown, "item_id": "i8"})
    assert_error(response, 409, "event_conflict", "interactions[1]")
    assert (await post(client, {**liked, "label": False})).status_code == 409
    text = recording.metrics.text().decode()
    for outcome_name, count in (("accepted", 3), ("duplicate", 4), ("forgotten", 0), ("refused", 3)):
        assert f'sella_interactions_total{{outcome="{outcome_name}"}} {count:.1f}' in text
    assert "sella_log_entries 3.0" in text and "sella_log_up 1.0" in text


async def test_a_score_labelled_negative_is_labelled_anew_by_a_later_positive(
    client: httpx.AsyncClient, recording: Collaborators
) -> None:
    answer = await rank(client, "u1", candidates=["i7"])
    shown = {"item_id": "i7", "request_id": answer["request_id"], "position": 1}
    for event_id, label in (("e1", False), ("e2", True), ("e3", True), ("e4", False)):
        assert (await post(client, told(event_id, label=label, **shown))).json()["accepted"] == 1
    text = recording.metrics.text().decode()
    assert 'sella_outcomes_total{outcome="labelled"} 1.0' in text
    assert 'sella_outcomes_total{outcome="relabelled"} 1.0' in text


async def test_each_impression_is_told_once(client: httpx.AsyncClient, recording: Collaborators) -> None:
    heard: list[tuple[str, bool]] = []
    recording.interactions.on_outcome = lambda one, positive: heard.append((one.event_id, positive))
    shown, disliked = told("e1", label=None), told("e2", label=False)
    for event in (shown, {**shown, "label": True}, {**shown, "label": True}, disliked, told("e3", item_id="i8")):
        await post(client, event)
    assert heard == [("e1", True), ("e2", False), ("e3", True)]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"label": 2}, "interactions[1].label"),
        ({"label": "yes"}, "interactions[1].label"),
        ({"timestamp": True}, "interactions[1].timestamp"),
        ({"timestamp": "yesterday"}, "interactions[1].timestamp"),
        ({"timestamp": 1_750_000_000_000}, "interactions[1].timestamp"),
        ({"timestamp": 10**400}, "interactions[1].timestamp"),
        ({"timestamp": "1e400"}, "interactions[1].timestamp"),
        ({"timestamp": "2999-01-01"}, "interactions[1].timestamp"),
        ({"event_id": ""}, "interactions[1].event_id"),
        ({"user_id": "a\nb"}, "interactions[1].user_id"),
        ({"request_id": "a b"}, "interactions[1].request_id"),
        ({"request_id": "a\n"}, "interactions[1].request_id"),
        ({"position": -1}, "interactions[1].position"),
        ({"surprise": 1}, "interactions[1].surprise"),
    ],
)
async def test_what_cannot_be_taken_names_its_place(
    client: httpx.AsyncClient, change: dict[str, Any], field: str
) -> None:
    response = await post(client, told("e1"), {**told("e2"), **change})
    assert_error(response, 422, "invalid_request", field)


async def test_timestamps_are_those_of_data_folders(client: httpx.AsyncClient, recording: Collaborators) -> None:
    now = int(time.time())
    iso = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    for number, form in enumerate((now, str(now), now + 0.0, iso, iso + "Z", iso + "+00:00")):
        assert (await post(client, told(f"e{number}", timestamp=form))).status_code == 200, form
    live = await recording.interactions.live(["u1"])
    assert {like.timestamp for like in live["u1"].likes} == {float(now)}


async def test_a_batch_over_its_limit_is_refused(client: httpx.AsyncClient) -> None:
    events = [told(f"e{number}") for number in range(1001)]
    assert_error(await post(client, *events), 422, "limit_exceeded", "interactions")


async def test_a_deleted_user_is_unknown_and_what_came_before_is_forgotten(
    client: httpx.AsyncClient, recording: Collaborators
) -> None:
    user_id = "u1"
    old = told("e1", user_id=user_id)
    await post(client, old)
    response = await client.delete(f"/users/{user_id}")
    assert response.status_code == 200 and response.json()["deleted_at"] >= old["timestamp"]
    answer = await rank(client, user_id)
    assert answer["cold_user"] and answer["history"]["source"] == "none"
    assert (await rank(client, user_id, history=["i1"]))["cold_user"]
    assert (await post(client, old)).json()["forgotten"] == 1
    assert (await client.delete(f"/users/{user_id}")).json()["deleted_at"] >= response.json()["deleted_at"]
    await post(client, told("e2", user_id=user_id, timestamp=time.time() + 1))
    back = await rank(client, user_id)
    assert back["cold_user"] and back["history"]["given"] == 1


@pytest.mark.parametrize("user_id", ["a/b", "/", "a?b#c%", "ünï/ 7", "x" * 256])
async def test_any_printable_user_id_can_be_deleted(
    client: httpx.AsyncClient, recording: Collaborators, user_id: str
) -> None:
    await post(client, told("e1", user_id=user_id))
    response = await client.delete(f"/users/{quote(user_id, safe='')}")
    assert response.status_code == 200 and response.json()["user_id"] == user_id
    live = await recording.interactions.live([user_id])
    assert live[user_id].likes == () and live[user_id].deleted_at == response.json()["deleted_at"]


async def test_ids_that_are_none_cannot_be_deleted(client: httpx.AsyncClient) -> None:
    assert_error(await client.delete("/users/" + "x" * 257), 422, "invalid_request", "user_id")
    assert_error(await client.delete("/users/a%01b"), 422, "invalid_request", "user_id")
    assert_error(await client.delete("/users/caf%E9"), 422, "invalid_request", "user_id")  # Latin-1: who is meant?


async def test_without_a_log_scores_go_on_and_interactions_are_refused(
    service: Collaborators,
) -> None:
    async with client_of(service) as client:  # its log was never opened
        assert (await rank(client, "u1"))["history"]["source"] == "bundle"
        assert_error(await post(client, told("e1")), 503, "log_unavailable")
        assert_error(await client.delete("/users/u1"), 503, "log_unavailable")
        ready = await client.get("/readyz")
        assert ready.status_code == 200 and not ready.json()["interactions"]["ready"]


@pytest.mark.parametrize(("before", "cold"), [(60.0, True), (-60.0, False)])
async def test_a_bundle_trained_after_a_deletion_scores_the_user_who_came_back(
    tmp_path: Path, before: float, cold: bool
) -> None:
    """The bundle's first row of the user is a minute before the deletion, or a minute after it."""
    later = tiny_bundle(tmp_path / "later", since=time.time() - before)
    service = collaborators(later, EchoEngine(), interactions=tmp_path / "log.sqlite")
    await service.interactions.start()
    async with client_of(service) as client:
        assert not (await rank(client, "u1"))["cold_user"]
        assert (await client.delete("/users/u1")).status_code == 200
        answer = await rank(client, "u1")
        assert answer["cold_user"] == cold
        assert answer["history"]["source"] == ("none" if cold else "bundle")
        await post(client, told("e1", timestamp=time.time() + 1))
        back = (await rank(client, "u1"))["history"]
        assert (back["source"], back["given"]) == ("live", answer["history"]["given"] + 1)
    await service.interactions.close()
