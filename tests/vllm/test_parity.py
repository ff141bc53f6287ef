"""vLLM's scores are `models.scorer.score` of the same prompts, whatever its prefix cache holds."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.assembly import Assembler
from models.features import ItemFeatures, Tables
from models.fusion import probabilities
from models.loading import Bundle
from models.packs import Branch, Pack, ScoringGroup
from models.projection import Verbatim
from models.scorer import score
from models.scoring_model import ScoringModel
from models.segments import Segment, SlotKind
from service.engines.protocol import BundlePlace, DistilJob, JobFailedError, ScoreJob
from service.engines.vllm import VllmEngine
from service.engines.vllm_prompts import PromptWriter
from tests.models.test_scoring_model import group_for, reference
from tests.tiny import tiny_bundle

pytestmark = pytest.mark.anyio

FP32 = 1e-5


async def ask(engine: VllmEngine, *groups: ScoringGroup) -> list[np.ndarray]:
    jobs = [ScoreJob(number, time.monotonic() + 120, group) for number, group in enumerate(groups)]
    outcomes = await engine.score(jobs)
    for outcome in outcomes:
        assert not isinstance(outcome, Exception), outcome
        assert outcome.dtype == np.float32
    return [probabilities(np.asarray(outcome)) for outcome in outcomes]


class Draw:
    """Random requests: histories of 0 to 50, 1 to 40 candidates, warm and cold, in the catalogue and outside."""

    def __init__(self, seed: int, model: ScoringModel, assembler: Assembler, tables: Tables) -> None:
        self.random = random.Random(seed)
        self.assembler = assembler
        self.tables = tables
        titles = ['A "title", nobody has seen <User_ID> 夜', "Brand new", "x"]
        prompts = [assembler.template.distil(assembler.title(title)) for title in titles]
        unseen = zip(titles, model.distil(prompts), strict=True)
        self.items: list[ItemFeatures] = [tables.unseen_item(title, title, vector) for title, vector in unseen]
        self.items += [item for one in tables.item_ids if (item := tables.item(one)) is not None]

    def group(self) -> ScoringGroup:
        user = self.tables.user(self.random.choice([*self.tables.user_ids, "nobody"]))
        window = self.random.choices(self.items, k=self.random.choice([0, 1, 3, 10, 50]))
        candidates = self.random.choices(self.items, k=self.random.choice([1, 2, 7, 40]))
        return self.assembler.group(self.assembler.user(user, window, len(window)), candidates)


async def test_random_groups_score_as_the_reference_in_any_company_and_again(
    engine: VllmEngine, model: ScoringModel, assembler: Assembler, tables: Tables
) -> None:
    draw = Draw(3, model, assembler, tables)
    groups = [draw.group() for _ in range(20)]
    expected = [reference(model, group) for group in groups]
    assert engine.core is not None
    for order in (range(20), draw.random.sample(range(20), 20)):
        cached = engine.core.cached_tokens
        for start in range(0, 20, 5):
            chosen = list(order)[start : start + 5]
            for index, got in zip(chosen, await ask(engine, *(groups[i] for i in chosen)), strict=True):
                np.testing.assert_allclose(got, expected[index], atol=FP32)
        assert engine.core.cached_tokens > cached + 1000, "trunks are not shared"


async def test_users_whose_prompts_have_equal_ids_do_not_share(
    engine: VllmEngine, model: ScoringModel, assembler: Assembler, tables: Tables
) -> None:
    first = group_for(assembler, tables, "u1", ["i1", "i39", "i2"])
    second = replace(first, user_1C=-first.user_1C)
    third = replace(first, semantic_KD=first.semantic_KD[::-1].copy())
    assert first.pack == second.pack == third.pack
    for groups in ([first, second, third], [third], [second], [first]):
        for group, got in zip(groups, await ask(engine, *groups), strict=True):
            np.testing.assert_allclose(got, reference(model, group), atol=FP32)
    [one], [other] = ([got[0]] for got in await ask(engine, first, second))
    assert abs(one - other) > 1e-3


async def test_a_zero_vector_in_a_slot_is_not_taken_for_the_token_whose_row_is_zero(
    engine: VllmEngine, model: ScoringModel, bundle_tokens: list[int]
) -> None:
    """vLLM's hash leaves the mask of slots out: these two prompts have the same ids and the same rows."""
    verbatim = Verbatim()
    width = model.backbone.d_model
    head, tail = tuple(bundle_tokens[:20]), tuple(bundle_tokens[20:60])
    branch = Branch(61, Segment((0, 0, *bundle_tokens[60:66]), ((SlotKind.ITEM, 0), (SlotKind.WARM, 1))))
    slot = Segment((*head, 0, *tail), ((SlotKind.USER, 20),))
    token = Segment((*head, 0, *tail))
    rows = np.random.default_rng(0).normal(size=(2, 1, width)).astype(np.float32)
    writer = PromptWriter(verbatim, torch.float32, "test")
    assert engine.core is not None
    for trunk in (slot, token, slot):
        group = ScoringGroup(Pack(trunk, (branch,)), np.zeros((1, width), np.float32), rows[0], rows[1])
        vectors = {
            SlotKind.USER: torch.zeros(width),
            SlotKind.ITEM: torch.from_numpy(rows[0, 0]),
            SlotKind.WARM: torch.from_numpy(rows[1, 0]),
        }
        expected = score(model.backbone, trunk + branch.segment, verbatim, vectors)
        [logit] = await engine.core.ask(writer.write(group))
        assert float(torch.tensor(logit).sigmoid()) == pytest.approx(expected, abs=FP32)


async def test_titles_are_distilled_as_by_the_packed_model(
    engine: VllmEngine, model: ScoringModel, assembler: Assembler
) -> None:
    prompts = tuple(assembler.template.distil(assembler.title(title)) for title in ("A", "A much longer title, new"))
    [vectors] = await engine.distil([DistilJob(1, time.monotonic() + 60, prompts)])
    assert not isinstance(vectors, JobFailedError)
    np.testing.assert_allclose(np.asarray(vectors), model.distil(prompts), atol=1e-4)


@pytest.fixture(scope="module")
def bundle_tokens(assembler: Assembler, tables: Tables) -> list[int]:
    return [token for title in tables.titles for token in assembler.title(title).token_ids if token]


async def test_a_bundle_of_equal_weights_is_attached_and_each_job_gets_its_own_projections(
    engine: VllmEngine,
    bundle: Bundle,
    model: ScoringModel,
    assembler: Assembler,
    tables: Tables,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    alike = tiny_bundle(tmp_path_factory.mktemp("alike") / "bundle", rest_seed=7, d_model=128)
    assert alike.manifest.backbone.merged_id == bundle.manifest.backbone.merged_id
    group = Draw(5, model, assembler, tables).group()
    await engine.attach(BundlePlace(alike.folder, alike.id))
    ids = [bundle.id, alike.id, "", alike.id]
    outcomes = await engine.score(
        [ScoreJob(number, time.monotonic() + 120, group, one) for number, one in enumerate(ids)]
    )
    own, other = reference(model, group), reference(alike.model(), group)
    assert not np.allclose(own, other, atol=1e-3)
    for outcome, expected in zip(outcomes, [own, other, own, other], strict=True):
        assert not isinstance(outcome, Exception), outcome
        np.testing.assert_allclose(probabilities(np.asarray(outcome)), expected, atol=FP32)
    engine.detach(alike.id)
    [gone] = await engine.score([ScoreJob(9, time.monotonic() + 120, group, alike.id)])
    assert isinstance(gone, JobFailedError)
    assert not isinstance((await engine.score([ScoreJob(10, time.monotonic() + 120, group, bundle.id)]))[0], Exception)
