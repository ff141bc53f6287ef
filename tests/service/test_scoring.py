"""The service's score, over HTTP with the real model, is `models.scorer.score` of the same prompt."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.assembly import Assembler, history_window
from models.features import ItemFeatures, Tables
from models.fusion import Counts, Known
from models.loading import Bundle
from models.scorer import score
from models.scoring_model import ScoringModel
from models.segments import SlotKind
from models.template import PromptKind
from service.engines.packed import PackedModel
from tests.service.conftest import client_of, collaborators
from tests.service.direct import DirectEngine
from tests.tiny import D_COLLAB

pytestmark = pytest.mark.anyio

NEW = {"item_id": "new", "title": 'A "title", nobody has seen — <User_ID> 夜'}


@pytest.fixture
async def scorer(bundle: Bundle, model: ScoringModel) -> AsyncIterator[httpx.AsyncClient]:
    engine = DirectEngine(PackedModel(bundle, model, batch_tokens=600))
    async with client_of(collaborators(bundle, engine, batch_tokens=600)) as client:
        yield client


class Reference:
    """One pair's score by the reference, its prompt and vectors put together here."""

    def __init__(self, bundle: Bundle, model: ScoringModel) -> None:
        self.tables: Tables = bundle.tables()
        self.assembler = bundle.assembler(bundle.encoder(), self.tables)
        self.template = self.assembler.template
        self.model = model
        self.fusion = bundle.fusion()

    def item(self, one: str | dict[str, str]) -> ItemFeatures:
        item_id, title = (one, "") if isinstance(one, str) else (one["item_id"], one["title"])
        known = self.tables.item(item_id)
        if known is not None:
            return known
        prompt = self.template.distil(self.template.titles([title])[0])
        return self.tables.unseen_item(item_id, title, self.model.distil([prompt])[0])

    def raw(self, user_id: str, one: str | dict[str, str], history: Sequence[str | dict[str, str]] | None) -> float:
        return self.pair(user_id, one, history)[0]

    def score(
        self,
        user_id: str,
        one: str | dict[str, str],
        history: Sequence[str | dict[str, str]] | None,
    ) -> float:
        """Return the fusion over the bundle's counts of the user and of the item."""
        raw, user_C, liked_C = self.pair(user_id, one, history)
        user, item = self.tables.user(user_id), self.item(one)
        of_user, of_item = user.counts if user else Counts(), item.counts
        known = Known(
            lm_K=np.array([np.log(raw) - np.log1p(-raw)]),
            user_KC=user_C[None],
            live_user_KC=user_C[None],
            item_KC=item.collab_C[None],
            liked_KC=liked_C[None],
            user_impressions_K=np.array([of_user.impressions]),
            user_positives_K=np.array([of_user.positives]),
            item_impressions_K=np.array([of_item.impressions]),
            item_positives_K=np.array([of_item.positives]),
            cold_user_K=np.array([user is None or user.vector_C is None]),
            cold_item_K=np.array([not item.trained]),
            like_ages_KL=np.full((1, 1), np.nan, np.float32),  # without a log newer likes may be missing
            live=False,  # the service under test has no log
        )
        return float(self.fusion(known)[0])

    def pair(
        self, user_id: str, one: str | dict[str, str], history: Sequence[str | dict[str, str]] | None
    ) -> tuple[float, NDArray[np.float32], NDArray[np.float32]]:
        """Return the raw score, the user's vector, and the mean vector of the likes in the prompt."""
        user, item = self.tables.user(user_id), self.item(one)
        if history is None:
            stored = user.history if user else ()
            window = [self.item(i) for i in history_window(stored, user.history_total if user else 0, self.template)]
        else:
            kept = history_window([str(i) for i in range(len(history))], len(history), self.template)
            window = [self.item(history[int(i)]) for i in kept]
        kind = PromptKind.PROJECT
        titles = self.template.titles([liked.title for liked in window])
        titles, shown = titles[self.template.first_kept(titles) :], window[self.template.first_kept(titles) :]
        prompt = (
            self.template.instruction(kind)
            + self.template.user_segment(kind, titles)
            + self.template.candidate(kind, self.template.titles([item.title])[0])
        )
        trained = user is not None and user.vector_C is not None
        liked_LC = np.array([liked.fold_C for liked in shown]).reshape(-1, D_COLLAB)
        folded = self.tables.prior.fold_in(liked_LC)
        vectors = {
            SlotKind.USER: user.vector_C if trained and user is not None and user.vector_C is not None else folded,
            SlotKind.ITEM: item.collab_C,
            SlotKind.WARM: item.semantic_D,
        }
        tensors = {kind: torch.from_numpy(np.array(vector)) for kind, vector in vectors.items()}
        raw = score(self.model.backbone, prompt, self.model.projections, tensors)
        return raw, np.array(vectors[SlotKind.USER]), liked_LC.sum(0) / max(1, len(liked_LC))


@pytest.fixture(scope="module")
def reference(bundle: Bundle, model: ScoringModel) -> Reference:
    return Reference(bundle, model)


async def rank(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/rank", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


CASES: list[tuple[str, str | dict[str, str], list[Any] | None]] = [
    ("u0", "i1", None),  # a warm user whose stored history is longer than the window
    ("u1", "i2", None),
    ("u18", "i3", None),  # a user without training data, folded in from the stored history
    ("u19", "i3", None),  # nor a history
    ("nobody", "i4", ["i1", "i2", "i3"]),
    ("nobody", "i4", None),
    ("u1", "i39", None),  # an item without training data
    ("u1", NEW, None),
    ("nobody", NEW, [NEW, "i5", "i5"]),
    ("u1", "i2", []),
    ("u1", "i2", [f"i{i}" for i in range(17)]),
]


@pytest.mark.parametrize(("user_id", "item", "history"), CASES)
async def test_a_score_is_the_references(
    scorer: httpx.AsyncClient, reference: Reference, user_id: str, item: Any, history: list[Any] | None
) -> None:
    answer = await rank(scorer, user_id=user_id, candidates=[item], history=history)
    [result] = answer["results"]
    assert answer["counts"] == "bundle"
    assert result["raw_score"] == pytest.approx(reference.raw(user_id, item, history), abs=1e-5)
    assert result["score"] == pytest.approx(reference.score(user_id, item, history), abs=1e-5)


async def test_both_routes_agree_and_order_and_neighbours_change_nothing(
    scorer: httpx.AsyncClient, reference: Reference
) -> None:
    candidates: list[Any] = [f"i{i}" for i in range(40)] + [NEW]
    expected = {str(i): reference.raw("u0", one, None) for i, one in enumerate(candidates)}
    shuffled = random.Random(0).sample(range(41), 41)
    together, other, pairs = await asyncio.gather(
        rank(scorer, user_id="u0", candidates=[candidates[i] for i in shuffled]),
        rank(scorer, user_id="u18", candidates=["i1", {"item_id": "other", "title": "Another new one"}]),
        scorer.post(
            "/score",
            json={"pairs": [{"user_id": f"u{i % 2}", "item_id": f"i{i}"} for i in range(10)]},
        ),
    )
    for result in together["results"]:
        place = "40" if result["item_id"] == "new" else result["item_id"][1:]
        assert result["raw_score"] == pytest.approx(expected[place], abs=1e-5)
    scores = [result["score"] for result in together["results"]]
    assert scores == sorted(scores, reverse=True)
    raw = [result["raw_score"] for result in together["results"]]
    assert raw != sorted(raw, reverse=True)  # else this would not tell the two orders apart
    assert [result["rank"] for result in together["results"]] == list(range(1, 42))
    assert len(other["results"]) == 2
    for index, result in enumerate(pairs.json()["results"]):
        assert (result["index"], result["item_id"]) == (index, f"i{index}")
        assert result["raw_score"] == pytest.approx(reference.raw(f"u{index % 2}", f"i{index}", None), abs=1e-5)


async def test_the_answer_says_how_each_score_came_about(scorer: httpx.AsyncClient, bundle: Bundle) -> None:
    history = ["i0"] * 7 + ["i1", {"item_id": "i2", "title": "Not its title"}, NEW, "i3", "i4"]
    known = bundle.tables().item("i6")
    assert known is not None
    answer = await rank(
        scorer,
        user_id="u0",
        candidates=[
            "i0",
            {"item_id": "i39", "title": "Wrong"},
            NEW,
            {"item_id": "long", "title": "word " * 100},
            {"item_id": "i6", "title": known.title},
        ],
        history=history,
    )
    assert answer["history"] == {
        "source": "request",
        "given": 12,
        "used": 7,
        "dropped": 5,
        "titles_cut": 0,
        "titles_ignored": 1,
    }
    assert not answer["cold_user"]
    marks = {one["item_id"]: one for one in answer["results"]}
    flags = ("cold_item", "unknown_item", "in_history", "title_ignored")
    assert [marks["i0"][flag] for flag in flags] == [False, False, True, False]
    assert [marks["i39"][flag] for flag in flags] == [True, False, False, True]
    assert [marks["new"][flag] for flag in flags] == [True, True, True, False]
    assert [marks["i6"][flag] for flag in flags] == [False, False, False, False]
    assert marks["long"]["title_tokens_cut"] > 0
    assert marks["i0"]["title_tokens_cut"] == 0


@pytest.mark.parametrize(
    ("user_id", "history", "source", "cold"),
    [
        ("u0", None, "bundle", False),
        ("u0", [], "request", False),
        ("u18", None, "bundle", True),
        ("x", None, "none", True),
    ],
)
async def test_where_the_history_came_from(
    scorer: httpx.AsyncClient, user_id: str, history: list[str] | None, source: str, cold: bool
) -> None:
    answer = await rank(scorer, user_id=user_id, candidates=["i1"], history=history)
    assert (answer["history"]["source"], answer["cold_user"]) == (source, cold)
    assert answer["history"]["given"] == answer["history"]["used"] + answer["history"]["dropped"]


async def test_skipped_items_are_reported_and_leave_the_others_alone(
    scorer: httpx.AsyncClient, reference: Reference
) -> None:
    pairs = [
        {"user_id": "u1", "item_id": "gone"},
        {"user_id": "u1", "item_id": "i1"},
        {"user_id": "u2", "item_id": "i1", "history": ["i3", "gone"]},
        {"user_id": "u3", "item_id": "gone"},
    ]
    answer = (await scorer.post("/score", json={"pairs": pairs, "on_unknown": "skip"})).json()
    assert [one["field"] for one in answer["skipped"]] == ["pairs[0]", "pairs[2].history[1]", "pairs[3]"]
    assert [one["index"] for one in answer["results"]] == [1, 2]
    assert answer["results"][0]["raw_score"] == pytest.approx(reference.raw("u1", "i1", None), abs=1e-5)
    assert answer["results"][1]["history"]["dropped"] == 1
    assert answer["results"][1]["raw_score"] == pytest.approx(reference.raw("u2", "i1", ["i3"]), abs=1e-5)


async def test_prompts_are_assembled_off_the_event_loop(
    scorer: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop_thread, threads = threading.get_ident(), []
    user = Assembler.user

    def noted(self: Assembler, *args: object) -> object:
        threads.append(threading.get_ident())
        return user(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Assembler, "user", noted)
    await rank(scorer, user_id="u0", candidates=["i1"])
    assert threads and loop_thread not in threads
