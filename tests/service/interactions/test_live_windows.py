"""A user's live likes give the prompt that the same ids give as the request's history, however many they are."""

import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.loading import Bundle
from models.scoring_model import ScoringModel
from service.collaborators import Collaborators
from service.engines.packed import PackedModel
from service.interactions.database import open_database
from service.interactions.ledger import Ledger
from service.interactions.live import EARLIER_LIKES, MAX_LIKES, Like
from tests.service.conftest import client_of, collaborators
from tests.service.direct import DirectEngine
from tests.service.interactions.conftest import NOW, event
from tests.tiny import HISTORY_END

pytestmark = pytest.mark.anyio

CANDIDATES = ["i1", "i2", "i39"]


@pytest.fixture
async def serving(bundle: Bundle, model: ScoringModel, tmp_path: Path) -> AsyncIterator[Collaborators]:
    engine = DirectEngine(PackedModel(bundle, model, batch_tokens=2048))
    service = collaborators(bundle, engine, interactions=tmp_path / "log.sqlite")
    await service.interactions.start()
    yield service
    await service.interactions.close()


@pytest.fixture
async def client(serving: Collaborators) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(serving) as client:
        yield client


async def like(client: httpx.AsyncClient, user_id: str, items: Sequence[str], first: float) -> None:
    """Report likes a second apart."""
    events = [
        {"event_id": f"{user_id} {first + place}", "user_id": user_id, "item_id": item, "label": True}
        | {"timestamp": first + place}
        for place, item in enumerate(items)
    ]
    answer = await client.post("/interactions", json={"interactions": events})
    assert answer.json()["accepted"] == len(items), answer.text


async def rank(client: httpx.AsyncClient, user_id: str, history: Sequence[str] | None = None) -> dict[str, Any]:
    response = await client.post("/rank", json={"user_id": user_id, "candidates": CANDIDATES, "history": history})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def raw(answer: dict[str, Any]) -> dict[str, float]:
    return {one["item_id"]: one["raw_score"] for one in answer["results"]}


async def assert_same(client: httpx.AsyncClient, user_id: str, ids: Sequence[str], unknown: int = 0) -> None:
    """Compare the stored and live history with the same ids, sent as the request's history."""
    live, sent = await rank(client, user_id), await rank(client, user_id, ids)
    assert live["history"]["given"] == len(ids) + unknown
    assert live["history"]["used"] == sent["history"]["used"]
    assert raw(live) == pytest.approx(raw(sent), abs=1e-5)


def whole_history(bundle: Bundle, user_id: str) -> list[str]:
    """Return as many ids as the user has liked, of which the bundle has the last ones."""
    user = bundle.tables().user(user_id)
    assert user is not None
    return ["i0"] * (user.history_total - len(user.history)) + [*user.history]


def items(count: int, shift: int = 0) -> list[str]:
    return [f"i{(7 * place + shift) % 40}" for place in range(count)]


async def test_any_number_of_likes_gives_the_window_of_the_same_ids(client: httpx.AsyncClient) -> None:
    liked = items(154)
    await like(client, "new", liked[:97], HISTORY_END + 1000)
    for number in range(97, 104):  # over the bound, like by like
        await assert_same(client, "new", liked[:number])
        await like(client, "new", [liked[number]], HISTORY_END + 1000 + number)
    await like(client, "new", liked[104:], HISTORY_END + 1104)
    await assert_same(client, "new", liked)
    assert len({(await rank(client, "new"))["history"]["used"]}) == 1


async def test_likes_beyond_the_bound_follow_the_stored_history(client: httpx.AsyncClient, bundle: Bundle) -> None:
    assert len(whole_history(bundle, "u0")) == 23
    for user_id in ("u0", "u1", "u19"):
        await like(client, user_id, items(131), HISTORY_END + 1000)
        await assert_same(client, user_id, [*whole_history(bundle, user_id), *items(131)])


async def test_likes_that_the_bundle_was_trained_on_are_not_counted_again(
    client: httpx.AsyncClient, bundle: Bundle
) -> None:
    user = bundle.tables().user("u0")
    assert user is not None
    for item, at in zip(user.history, user.history_times, strict=True):
        await like(client, "u0", [item], at)
    await like(client, "u0", items(90), user.history_times[0] - 1000)  # before the stored tail: in its total
    await like(client, "u0", items(95), HISTORY_END + 1000)
    ids = [*whole_history(bundle, "u0"), *items(95)]
    await assert_same(client, "u0", ids)
    await like(client, "u0", items(30), HISTORY_END + 2000)
    await assert_same(client, "u0", [*ids, *items(30)])


async def test_likes_of_items_outside_the_catalogue_take_no_place_in_the_window(
    client: httpx.AsyncClient, bundle: Bundle
) -> None:
    await like(client, "u1", [f"gone{place}" for place in range(10)], HISTORY_END + 1000)
    await assert_same(client, "u1", whole_history(bundle, "u1"), unknown=10)
    mixed = [one if place % 3 else f"gone{place}" for place, one in enumerate(items(154))]
    await like(client, "mixed", mixed, HISTORY_END + 1000)
    known = [one for one in mixed if not one.startswith("gone")]
    await assert_same(client, "mixed", known, unknown=len(mixed) - len(known))
    await like(client, "lost", [*items(17), *(f"gone{place}" for place in range(MAX_LIKES + 20))], HISTORY_END + 1000)
    await assert_same(client, "lost", items(17), unknown=MAX_LIKES + 20)
    await like(client, "only", ["gone"] * 3, HISTORY_END + 1000)
    nothing = (await rank(client, "only"))["history"]
    assert (nothing["source"], nothing["given"], nothing["used"]) == ("live", 3, 0)


async def test_after_a_deletion_the_number_begins_anew(client: httpx.AsyncClient) -> None:
    await like(client, "u0", items(154), HISTORY_END + 1000)
    assert (await client.delete("/users/u0")).status_code == 200
    assert (await rank(client, "u0"))["history"]["given"] == 0
    await like(client, "u0", items(123, 3), time.time() + 5)
    await assert_same(client, "u0", items(123, 3))


async def test_what_has_left_the_log_is_not_counted(client: httpx.AsyncClient, serving: Collaborators) -> None:
    await like(client, "new", items(60), HISTORY_END + 1000)
    await like(client, "new", items(130, 5), time.time() + 3600)
    await serving.interactions._log._write(lambda ledger: ledger.prune(time.time() + 60, 1000))
    await assert_same(client, "new", items(130, 5))


def test_a_log_of_an_earlier_version_counts_the_likes_that_it_has_forgotten(tmp_path: Path) -> None:
    path, count = tmp_path / "log.sqlite", MAX_LIKES + EARLIER_LIKES + 30
    with closing(open_database(path)) as connection:
        ledger = Ledger(connection, 60.0)
        connection.execute("BEGIN")
        ledger.take([event(f"e{place:04}", timestamp=NOW + place) for place in range(count)], NOW)
        connection.execute("DELETE FROM likes WHERE timestamp < ?", (NOW + count - MAX_LIKES,))
        connection.execute("DELETE FROM meta WHERE key = 'likes'")
        connection.execute("COMMIT")
    with closing(open_database(path)) as connection:
        live = Ledger(connection, 60.0).live(["u1"])["u1"]
        assert [len(live.likes), len(live.earlier), live.more] == [MAX_LIKES, EARLIER_LIKES, 30]
        assert Like(*live.earlier[0]) < live.likes[0] and live.earlier[0] > live.earlier[-1]
        since = Ledger(connection, 60.0).live(["u1"], lambda user_id, deleted_at: NOW + 40)["u1"]
        assert (len(since.earlier), since.more) == (count - MAX_LIKES - 41, 0)
    with closing(sqlite3.connect(path)) as plain:
        assert plain.execute("SELECT count(*) FROM likes").fetchone() == (count,)
