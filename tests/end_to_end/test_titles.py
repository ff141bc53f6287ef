"""One text as a title in a data folder, batch scoring, the prompt command and a request: one answer or refusal."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest

from models.loading import Bundle
from models.scoring_model import ScoringModel
from models.titles import TitleError
from service.engines.packed import PackedModel
from tests.service.conftest import client_of, collaborators
from tests.service.direct import DirectEngine
from training.batch import score_pairs
from training.data.columns import parse_titles
from training.data.errors import DataError
from training.data.tables import Table
from training.evaluate import Scorer
from training.inspection import describe_prompt

pytestmark = pytest.mark.anyio

CLEAN = "The Copper Lighthouse"
SAME = [
    CLEAN,
    "The  Copper Lighthouse ",
    "\tThe Copper\r\nLighthouse",
    "The\u00a0Copper\u3000Lighthouse",
    "The\x00Copper Lighthouse",
    "\ufeffThe Copper Light\u200bhouse",
    "The\u2028Copper\x85Lighthouse\u200d",
    "The Copper Light\u00adhouse\u2060",
]
REFUSED = ["", "  ", "\u200b", "\x00\n", "\u3164", "\ue000"]


@pytest.fixture(scope="module")
def scorer(bundle: Bundle) -> Scorer:
    tables, model = bundle.tables(), bundle.model()
    return Scorer(model, tables, bundle.assembler(model.backbone.encoder, tables))


@pytest.fixture
async def client(bundle: Bundle, scorer: Scorer, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    model: ScoringModel = scorer.model
    engine = DirectEngine(PackedModel(bundle, model, batch_tokens=1024))
    async with client_of(collaborators(bundle, engine, interactions=tmp_path / "log.sqlite")) as client:
        yield client


async def post(client: httpx.AsyncClient, route: str, body: dict[str, Any]) -> httpx.Response:
    return await client.post(route, content=json.dumps(body), headers={"content-type": "application/json"})


def in_folder(title: str) -> str:
    return str(parse_titles(Table("items.csv", pl.DataFrame({"title": [title]})), "title")[0])


def in_batch(
    bundle: Bundle, scorer: Scorer, folder: Path, titles: list[str], **options: Any
) -> tuple[pl.DataFrame, int]:
    rows = {"user_id": ["u1"] * len(titles), "item_id": [f"n{row}" for row in range(len(titles))], "title": titles}
    pl.DataFrame(rows).write_parquet(folder / "pairs.parquet")
    out = folder / "out.parquet"
    out.unlink(missing_ok=True)
    asked = {"skip_unknown": False, "chunk": 3, **options}
    return (cleaned := score_pairs(bundle, scorer, folder / "pairs.parquet", out, **asked), pl.read_parquet(out))[
        1
    ], cleaned


async def test_titles_that_look_alike_have_one_score_everywhere_and_what_was_changed_is_told(
    client: httpx.AsyncClient, bundle: Bundle, scorer: Scorer, tmp_path: Path
) -> None:
    expected = describe_prompt(bundle, scorer, "u1", "new", None, CLEAN)
    assert {in_folder(title) for title in SAME} == {CLEAN}
    batch, cleaned = in_batch(bundle, scorer, tmp_path, SAME)
    assert cleaned == len(SAME) - 1
    assert batch["raw_score"].to_list() == pytest.approx([expected["raw_score"]] * len(SAME), abs=1e-6)
    for title in SAME:
        told = describe_prompt(bundle, scorer, "u1", "new", None, title)
        assert told["token_ids"] == expected["token_ids"]
        history = [{"item_id": "old", "title": title}]
        pair = {"user_id": "u1", "item_id": "new", "title": title}
        [plain, behind] = (await post(client, "/score", {"pairs": [pair, {**pair, "history": history}]})).json()[
            "results"
        ]
        assert plain["raw_score"] == pytest.approx(expected["raw_score"], abs=1e-6)
        assert plain.get("title") == behind.get("title") == (None if title == CLEAN else CLEAN)
        assert behind["history"].get("titles_cleaned") == (None if title == CLEAN else 1)


async def test_a_title_of_the_catalogue_with_blanks_around_it_is_the_catalogues(
    client: httpx.AsyncClient, bundle: Bundle
) -> None:
    title = bundle.tables().titles[3]
    candidates = [{"item_id": "i3", "title": f"\u00a0{title}  "}, {"item_id": "i4", "title": title}]
    results = (await post(client, "/rank", {"user_id": "u1", "candidates": candidates})).json()["results"]
    assert {one["item_id"]: one["title_ignored"] for one in results} == {"i3": False, "i4": True}
    assert not any("title" in one for one in results)


@pytest.mark.parametrize("title", REFUSED)
async def test_what_is_no_title_is_refused_everywhere_and_skip_leaves_it_out(
    client: httpx.AsyncClient, bundle: Bundle, scorer: Scorer, tmp_path: Path, title: str
) -> None:
    with pytest.raises(DataError, match="is no title"):
        in_folder(title)
    with pytest.raises(TitleError):
        describe_prompt(bundle, scorer, "u1", "new", None, title)
    with pytest.raises(DataError, match="'n0' is not in the bundle's catalogue"):
        in_batch(bundle, scorer, tmp_path, [title])
    skipped, cleaned = in_batch(bundle, scorer, tmp_path, [title, CLEAN], skip_unknown=True)
    assert skipped["raw_score"].is_null().to_list() == [True, False] and cleaned == 0
    body = {"user_id": "u1", "candidates": ["i1", {"item_id": "n0", "title": title}, {"item_id": "i2", "title": title}]}
    refused = await post(client, "/rank", body)
    assert refused.status_code == 422 and refused.json()["error"]["field"] == "candidates[1].title"
    answer = (await post(client, "/rank", {**body, "on_unknown": "skip"})).json()
    assert answer["skipped"] == [{"field": "candidates[1]", "item_id": "n0", "reason": "refused_title"}]
    assert {one["item_id"]: one["title_ignored"] for one in answer["results"]} == {"i1": False, "i2": True}


async def test_half_a_surrogate_pair_is_refused_in_one_place(client: httpx.AsyncClient) -> None:
    body = {"user_id": "u1", "candidates": [{"item_id": "n0", "title": "a\ud800"}]}
    refused = await post(client, "/rank", body)
    assert refused.status_code == 422 and refused.json()["error"]["field"] == "candidates[0].title"
