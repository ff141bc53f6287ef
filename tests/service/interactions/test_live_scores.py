"""After every step the served scores equal the fusion of the same events, with the real model and log."""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from models.assembly import AssembledUser, Assembler, history_window
from models.features import Evidence, ItemFeatures, Outcome
from models.fusion import PARTS, Counts, Known
from models.loading import Bundle
from models.scoring_model import ScoringModel
from models.template import Template
from service.collaborators import Collaborators
from service.engines.packed import PackedModel
from tests.service.bundles import give
from tests.service.conftest import client_of, collaborators
from tests.service.direct import DirectEngine
from tests.service.echo import EchoEngine
from tests.tiny import HISTORY_END, tiny_bundle

pytestmark = pytest.mark.anyio

NEW = {"item_id": "new", "title": "A title nobody has seen"}
CANDIDATES: list[Any] = ["i1", "i2", "i39", NEW]
LIVE_AT = HISTORY_END + 1000


class Offline:
    """The score by `Fusion` from the tables, and the likes, counts and outcomes that the test keeps."""

    def __init__(self, bundle: Bundle) -> None:
        self.tables, self.fusion = bundle.tables(), bundle.fusion()
        self.most_likes = bundle.manifest.template.max_history
        self.users: dict[str, Counts] = {}
        self.items: dict[str, Counts] = {}
        self.outcomes = {one: list(self.tables.stored_outcomes(one)) for one in self.tables.user_ids}
        self.likes = {
            one: list(zip(times, items, strict=True))
            for one, times, items in zip(
                self.tables.user_ids, self.tables.history_times, self.tables.histories, strict=True
            )
        }
        self.shown = 0.0  # the time of the newest event
        self.deleted: set[str] = set()

    def saw(self, user_id: str, item_id: str, impressions: int, positives: int) -> None:
        for table, one in ((self.users, user_id), (self.items, item_id)):
            table[one] = table.get(one, Counts()) + Counts(impressions, positives)
        outcomes = self.outcomes.setdefault(user_id, [])
        shown = self.shown
        if not impressions:  # a negative that becomes a positive
            shown = outcomes.pop().shown
        outcomes.append(Outcome(item_id, positives > 0, shown))
        if positives:
            self.likes_at(user_id, item_id, self.shown)

    def likes_at(self, user_id: str, item_id: str, at: float) -> None:
        self.likes[user_id] = sorted([*self.likes.get(user_id, []), (at, item_id)])

    def forgets(self, user_id: str) -> None:
        self.users.pop(user_id, None)
        self.outcomes.pop(user_id, None)
        self.likes.pop(user_id, None)
        self.deleted.add(user_id)

    def window(self, user_id: str, template: Template) -> list[ItemFeatures]:
        """Return the items of the user's likes that a prompt shows."""
        likes = [item_id for _, item_id in self.likes.get(user_id, []) if self.tables.has_item(item_id)]
        row = None if user_id in self.deleted else self.tables._user_rows.get(user_id)
        before = 0 if row is None else self.tables.history_totals[row] - len(self.tables.histories[row])
        kept = history_window(likes, before + len(likes), template)
        return [item for one in kept if (item := self.tables.item(one)) is not None]

    def live_vector(self, user_id: str, shown: list[ItemFeatures]) -> np.ndarray:
        """Return the posterior mean of the user's vector, computed from the formula in fp64."""
        prior, tables = self.tables.prior, self.tables
        user = None if user_id in self.deleted else tables.user(user_id)
        known = [(item, one) for one in self.outcomes.get(user_id, [])[-100:] if (item := tables.item(one.item_id))]
        rows = [(item.fold_C, float(one.positive), prior.outcome_noise) for item, one in known]
        shown_H = np.array([one.shown for _, one in known])
        mean_C, covariance_CC = prior.mean_C.astype(float), prior.covariance_CC.astype(float)
        if user is not None and user.vector_C is not None:
            seen = tables.train_impressions_U[tables.user_ids.index(user_id)]
            mean_C, covariance_CC = (
                user.vector_C.astype(float),
                covariance_CC * prior.strength / (prior.strength + seen),
            )
        else:
            liked = {item.item_id for item, one in known if one.positive}
            rows += [(item.fold_C, prior.target, prior.noise) for item in shown if item.item_id not in liked]
        if not rows:
            return mean_C.astype(np.float32)
        items_HC, observed_H, noise_H = (np.array(one, float) for one in zip(*rows, strict=True))
        system_HH, gain_CH = items_HC @ covariance_CC @ items_HC.T + np.diag(noise_H), covariance_CC @ items_HC.T
        for to, drifting in (
            (system_HH[: len(known), : len(known)], np.abs(shown_H[:, None] - shown_H)),
            (gain_CH[-2, : len(known)], time.time() - shown_H),
        ):
            to += prior.drift_variance * np.exp(-drifting / prior.drift_seconds)
        gain_C = gain_CH @ np.linalg.inv(system_HH) @ (observed_H - items_HC @ mean_C)
        return np.asarray(mean_C + gain_C, np.float32)

    def logit(
        self,
        user_id: str,
        result: dict[str, Any],
        user_CC: tuple[np.ndarray, np.ndarray],
        item_C: np.ndarray,
        liked: list[ItemFeatures],
        *,
        live: bool = True,
        times: bool = True,
    ) -> float:
        """Return the logit of a score.

        `user_CC` are the user's static vector and the live vector, `liked` the items of the history in the prompt;
        without `times` it is a request's history, whose likes have no times.
        """
        likes = self.likes.get(user_id, [])[-self.most_likes :]
        ages = [max(0.0, time.time() - at) for at, _ in likes] if live and times else [math.nan]
        user = None if user_id in self.deleted else self.tables.user(user_id)
        item = self.tables.item(result["item_id"])
        of_user = (user.counts if user else Counts()) + self.users.get(user_id, Counts())
        of_item = (item.counts if item else Counts()) + self.items.get(result["item_id"], Counts())
        raw = result["raw_score"]
        known = Known(
            lm_K=np.array([math.log(raw) - math.log1p(-raw)]),
            user_KC=user_CC[0][None],
            live_user_KC=user_CC[1][None],
            item_KC=item_C[None],
            liked_KC=np.mean([np.zeros_like(item_C)] if not liked else [one.fold_C for one in liked], axis=0)[None],
            user_impressions_K=np.array([of_user.impressions]),
            user_positives_K=np.array([of_user.positives]),
            item_impressions_K=np.array([of_item.impressions]),
            item_positives_K=np.array([of_item.positives]),
            cold_user_K=np.array([user is None or user.vector_C is None]),
            cold_item_K=np.array([item is None or not item.trained]),
            like_ages_KL=np.array([ages], np.float32),
            live=live,
        )
        return float(self.fusion.logits(known)[0])


@pytest.fixture
async def serving(bundle: Bundle, model: ScoringModel, tmp_path: Path) -> AsyncIterator[Collaborators]:
    engine = DirectEngine(PackedModel(bundle, model, batch_tokens=600))
    service = collaborators(bundle, engine, interactions=tmp_path / "log.sqlite", attribution_s=1.0, batch_tokens=600)
    await service.interactions.start()
    yield service
    await service.interactions.close()


@pytest.fixture
async def client(serving: Collaborators) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(serving) as client:
        yield client


class Steps:
    """Posts events and compares the next answers with scores computed here."""

    def __init__(self, client: httpx.AsyncClient, bundle: Bundle, model: ScoringModel) -> None:
        self.client, self.offline = client, Offline(bundle)
        self.assembler = bundle.assembler(bundle.encoder(), self.offline.tables)
        distilled = model.distil([self.assembler.template.distil(self.assembler.title(NEW["title"]))])[0]
        self.new = self.offline.tables.unseen_item(NEW["item_id"], NEW["title"], distilled)
        self.number = 0

    async def post(self, user_id: str, item_id: str, label: bool | None, at: float = LIVE_AT, **more: Any) -> str:
        self.number += 1
        event = {"event_id": f"e{self.number}", "user_id": user_id, "item_id": item_id, "label": label, **more}
        event["timestamp"] = self.offline.shown = at + self.number
        answer = await self.client.post("/interactions", json={"interactions": [event]})
        assert answer.status_code == 200, answer.text
        return str(event["event_id"])

    async def assert_scores(self, user_id: str, history: list[str] | None = None) -> None:
        """Compare the answer with the fusion, with the user's own likes or with the history of the request."""
        body = {"user_id": user_id, "candidates": CANDIDATES, "explain": True, "history": history}
        ranked = (await self.client.post("/rank", json=body)).json()
        assert ranked["counts"] == "live"
        tables = self.offline.tables
        liked = [item for one in history or [] if (item := tables.item(one)) is not None]
        if history is None:
            liked = self.offline.window(user_id, self.assembler.template)
        user = None if user_id in self.offline.deleted else tables.user(user_id)
        static_C = self.assembler.user(user, liked, len(liked)).vector_C
        vectors = static_C, self.offline.live_vector(user_id, liked)
        for result in ranked["results"]:
            item = tables.item(result["item_id"]) or self.new
            logit = self.offline.logit(user_id, result, vectors, item.collab_C, liked, times=history is None)
            assert result["score"] == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-6), result
            assert tuple(result["parts"]) == PARTS
            assert sum(result["parts"].values()) == pytest.approx(
                math.log(result["score"]) - math.log1p(-result["score"]), abs=1e-5
            )
        scores = [one["score"] for one in ranked["results"]]
        assert scores == sorted(scores, reverse=True)


async def test_every_acknowledged_interaction_is_in_the_next_score(
    client: httpx.AsyncClient, bundle: Bundle, model: ScoringModel
) -> None:
    steps = Steps(client, bundle, model)
    offline = steps.offline
    for user_id in ("u0", "u1"):
        await steps.assert_scores(user_id)
    await steps.post("u0", "i1", False)
    offline.saw("u0", "i1", 1, 0)
    await steps.assert_scores("u0")
    await steps.post("u1", "i1", True)
    offline.saw("u1", "i1", 1, 1)
    await steps.assert_scores("u0")  # another user's outcome counts for the item
    await steps.assert_scores("u1")
    shown = {"request_id": "r", "position": 1}
    await steps.post("u0", "i2", False, **shown)
    await steps.post("u0", "i2", True, **shown)  # a negative that becomes a positive
    offline.saw("u0", "i2", 1, 1)
    await steps.assert_scores("u0")
    await steps.post("u0", "new", True)  # an item outside the catalogue
    offline.saw("u0", "new", 1, 1)
    await steps.assert_scores("u0")
    await steps.post("u0", "i39", True, at=HISTORY_END - 100)  # the bundle's own counts may have it
    offline.likes_at("u0", "i39", HISTORY_END - 100 + steps.number)
    await steps.assert_scores("u0")
    await steps.assert_scores("u0", ["i3", "i4"])  # a request's history changes no count


async def test_a_user_unknown_to_the_bundle_counts_from_the_first_outcome(
    client: httpx.AsyncClient, bundle: Bundle, model: ScoringModel
) -> None:
    steps = Steps(client, bundle, model)
    await steps.assert_scores("stranger")
    await steps.post("stranger", "i2", True)
    steps.offline.saw("stranger", "i2", 1, 1)
    await steps.assert_scores("stranger")
    await steps.post("stranger", "i1", False)
    steps.offline.saw("stranger", "i1", 1, 0)
    await steps.assert_scores("stranger")


async def test_a_cold_users_vector_joins_the_outcomes_of_the_bundle_and_of_the_log(
    client: httpx.AsyncClient, bundle: Bundle, model: ScoringModel
) -> None:
    steps = Steps(client, bundle, model)
    assert steps.offline.outcomes["u18"] and not steps.offline.tables.user_trained_U[18]
    await steps.assert_scores("u18")
    await steps.post("u18", "i1", False)
    steps.offline.saw("u18", "i1", 1, 0)
    await steps.assert_scores("u18")
    await steps.assert_scores("u18", ["i3", "i1"])  # likes are observed in addition to the outcomes
    await steps.post("u18", "i2", True, at=time.time() - 3600)  # the newest outcomes say most of this moment
    steps.offline.saw("u18", "i2", 1, 1)
    await steps.assert_scores("u18")
    before, after = (
        steps.offline.live_vector("u18", []) for steps.offline.outcomes["u18"] in ([], [Outcome("i1", False, LIVE_AT)])
    )
    assert np.abs(before - after).max() > 1e-2


async def test_a_trained_users_vector_is_updated_once_a_request(
    client: httpx.AsyncClient, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    updated, given = [], Assembler.updated

    def noted(self: Assembler, user: AssembledUser, evidence: Evidence, at: float) -> AssembledUser:
        updated.append(user.cold)
        return given(self, user, evidence, at)

    monkeypatch.setattr(Assembler, "updated", noted)
    pairs = [
        {"user_id": user_id, "item_id": "i1", "history": history}
        for user_id in ("u0", "u18")
        for history in (["i3"], ["i4", "i5"], [])
    ]
    together = (await client.post("/score", json={"pairs": pairs})).json()["results"]
    assert sorted(updated) == [False, True, True, True]  # a cold user's vector depends on the history
    for pair, result in zip(pairs, together, strict=True):
        [alone] = (await client.post("/score", json={"pairs": [pair]})).json()["results"]
        assert result["score"] == pytest.approx(alone["score"], abs=1e-5)


async def test_an_impression_counts_once_its_time_has_passed(
    client: httpx.AsyncClient, bundle: Bundle, model: ScoringModel, serving: Collaborators
) -> None:
    steps = Steps(client, bundle, model)
    event_id = await steps.post("u2", "i1", None)
    await steps.assert_scores("u2")
    until = time.monotonic() + 10
    while not serving.bundles.current.counts.of(["u2"], []).users:
        assert time.monotonic() < until
        await asyncio.sleep(0.05)
    steps.offline.saw("u2", "i1", 1, 0)
    await steps.assert_scores("u2")
    steps.number -= 1  # the same event, with its outcome
    assert await steps.post("u2", "i1", True) == event_id
    steps.offline.saw("u2", "i1", 0, 1)
    await steps.assert_scores("u2")


async def test_a_deleted_user_has_no_counts_and_the_items_keep_theirs(
    client: httpx.AsyncClient, bundle: Bundle, model: ScoringModel
) -> None:
    steps = Steps(client, bundle, model)
    await steps.post("u1", "i1", True)
    steps.offline.saw("u1", "i1", 1, 1)
    assert (await client.delete("/users/u1")).status_code == 200
    steps.offline.forgets("u1")
    await steps.assert_scores("u1")
    await steps.assert_scores("u0")
    await steps.post("u1", "i2", True, at=time.time() + 10)
    steps.offline.saw("u1", "i2", 1, 1)
    await steps.assert_scores("u1")


async def test_parts_are_there_only_where_they_are_asked_for(client: httpx.AsyncClient) -> None:
    pairs = {"pairs": [{"user_id": "u1", "item_id": "i1"}, {"user_id": "u2", "item_id": "i2"}]}
    plain = (await client.post("/score", json=pairs)).json()
    explained = (await client.post("/score", json={**pairs, "explain": True})).json()
    assert all("parts" not in one for one in plain["results"])
    for one in explained["results"]:
        logit = math.log(one["score"]) - math.log1p(-one["score"])
        assert tuple(one["parts"]) == PARTS and sum(one["parts"].values()) == pytest.approx(logit, abs=1e-5)
    assert [one["score"] for one in plain["results"]] == pytest.approx([one["score"] for one in explained["results"]])
    refused = await client.post("/score", json={**pairs, "explain": "yes"})
    assert refused.status_code == 422 and refused.json()["error"]["field"] == "explain"


async def test_without_a_log_the_bundles_counts_and_their_weights_stand_and_the_answer_says_so(
    bundle: Bundle, model: ScoringModel, tmp_path: Path
) -> None:
    engine = DirectEngine(PackedModel(bundle, model, batch_tokens=600))
    service = collaborators(bundle, engine, interactions=tmp_path / "missing" / "log.sqlite", batch_tokens=600)
    await service.interactions.start()
    async with client_of(service) as client:
        body = {"user_id": "u1", "candidates": ["i1"]}
        without = (await client.post("/rank", json=body)).json()
        assert without["counts"] == "bundle"
        (tmp_path / "missing").mkdir()
        until = time.monotonic() + 15
        while (found := (await client.post("/rank", json=body)).json())["counts"] == "bundle":
            assert time.monotonic() < until
            await asyncio.sleep(0.1)
    offline = Offline(bundle)  # nothing has been counted yet
    user, item = offline.tables.user("u1"), offline.tables.item("i1")
    liked = offline.window("u1", bundle.assembler(bundle.encoder(), offline.tables).template)
    assert user is not None and user.vector_C is not None and item is not None
    for answer in (without, found):
        [result] = answer["results"]
        vectors = (user.vector_C, offline.live_vector("u1", []))
        logit = offline.logit("u1", result, vectors, item.collab_C, liked, live=answer["counts"] == "live")
        assert result["score"] == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-6), answer["counts"]
    await service.interactions.close()


async def test_each_bundle_counts_from_where_its_own_counts_end(tmp_path: Path) -> None:
    """Training rows of a newer bundle do not count twice in it, and both bundles continue to count."""
    old = tiny_bundle(tmp_path / "old")
    new = tiny_bundle(tmp_path / "new", rest_seed=1, counted_until=LIVE_AT + 50)
    service = collaborators(old, EchoEngine(), interactions=tmp_path / "log.sqlite")
    await service.interactions.start()

    def event(name: str, at: float) -> dict[str, Any]:
        return {"event_id": name, "user_id": "u1", "item_id": "i1", "label": True, "timestamp": at}

    async with client_of(service) as client:
        first = [event("trained on", LIVE_AT), event("since", LIVE_AT + 100)]
        assert (await client.post("/interactions", json={"interactions": first})).status_code == 200
        assert (await give(client, new, "canary", share=1.0)).status_code == 200
        await client.post("/interactions", json={"interactions": [event("later", LIVE_AT + 200)]})
        counts = {role: seat.handle.counts.of(["u1"], ["i1"]) for role, seat in service.bundles.roles.items()}
        assert [one.users["u1"] for one in counts.values()] == [Counts(3, 3), Counts(2, 2)]
        assert [one.items["i1"] for one in counts.values()] == [Counts(3, 3), Counts(2, 2)]
        canary = (await client.post("/rank", json={"user_id": "u1", "candidates": ["i1"]})).json()
        assert (canary["bundle_id"], canary["counts"]) == (new.id, "live")
    await service.changes.close()
    await service.changes.free()
    await service.interactions.close()
