import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.bundle import BundleError
from models.loading import Bundle
from models.packed import Row
from models.packs import ScoringGroup
from models.scorer import logit
from models.scoring_model import ScoringModel
from models.segments import Segment, SlotKind
from service.bundles.handle import open_parts
from service.engines.packed import PackedModel, PackedSource
from service.engines.protocol import BundlePlace, JobFailedError
from tests.service.bundles import forge, tensors
from tests.tiny import tiny_bundle


@pytest.fixture(scope="module")
def packed(bundle: Bundle, model: ScoringModel) -> PackedModel:
    return PackedModel(bundle, model, batch_tokens=1024)


@pytest.fixture(scope="module")
def groups(bundle: Bundle) -> list[ScoringGroup]:
    tables = bundle.tables()
    assembler = bundle.assembler(bundle.encoder(), tables)
    items = [item for i in range(6) if (item := tables.item(f"i{i}")) is not None]
    return [assembler.group(assembler.user(tables.user(f"u{i}"), items[:i], i), items[: i + 1]) for i in range(4)]


def scores(outcomes: Sequence[object]) -> list[np.ndarray]:
    return [one for one in outcomes if isinstance(one, np.ndarray)]


def test_a_group_that_is_not_finite_fails_alone(packed: PackedModel, groups: list[ScoringGroup]) -> None:
    poisoned = replace(groups[1], user_1C=np.full_like(groups[1].user_1C, np.nan))
    alone = [packed.score([one])[0] for one in groups]
    together = packed.score([groups[0], poisoned, *groups[2:]])
    assert isinstance(together[1], JobFailedError)
    for got, expected in zip([together[0], *together[2:]], [alone[0], *alone[2:]], strict=True):
        assert not isinstance(got, JobFailedError) and not isinstance(expected, JobFailedError)
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_group_that_raises_fails_alone(packed: PackedModel, groups: list[ScoringGroup]) -> None:
    misshapen = replace(groups[2], item_KC=groups[2].item_KC[:, :-1])
    outcomes = packed.score([groups[0], misshapen])
    assert isinstance(outcomes[1], JobFailedError)
    assert len(scores(outcomes)) == 1


def test_titles_distil_alike_alone_and_together(packed: PackedModel, bundle: Bundle) -> None:
    tables = bundle.tables()
    assembler = bundle.assembler(bundle.encoder(), tables)
    prompts = [assembler.template.distil(assembler.title(title)) for title in tables.titles[:5]]
    [first, second] = scores(packed.distil([prompts[:2], prompts[2:]]))
    alone = [scores(packed.distil([[prompt]]))[0][0] for prompt in prompts]
    np.testing.assert_allclose(np.concatenate([first, second]), np.stack(alone), atol=1e-4)


def test_a_distilled_vector_that_is_not_finite_is_an_error(
    packed: PackedModel, bundle: Bundle, model: ScoringModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembler = bundle.assembler(bundle.encoder(), bundle.tables())
    short, long = (assembler.template.distil(assembler.title(title)) for title in ("A", "A much longer title"))
    distil = model.distil

    def poisoned(prompts: Sequence[Segment], max_tokens: int) -> np.ndarray:
        vectors = distil(prompts, max_tokens)
        vectors[[len(prompt) == len(long) for prompt in prompts]] = np.nan
        return vectors

    monkeypatch.setattr(model, "distil", poisoned)
    good, bad = packed.distil([[short], [long]])
    assert isinstance(bad, JobFailedError) and not isinstance(good, JobFailedError)


def test_warming_up_passes_a_good_model_and_refuses_a_bad_one(
    packed: PackedModel, model: ScoringModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed.warm_up()
    monkeypatch.setattr(model, "logits", lambda groups, max_tokens, vectors: [][0])
    with pytest.raises(JobFailedError):
        packed.warm_up()


def test_a_bundle_that_changed_since_is_refused(bundle: Bundle) -> None:
    source = PackedSource((BundlePlace(bundle.folder, "0" * 64),), "cpu", None, 1024, 0)
    with pytest.raises(BundleError, match="holds bundle"):
        source.open()


def test_jobs_of_two_bundles_share_a_batch_and_each_gets_its_own_projections(
    bundle: Bundle, model: ScoringModel, tmp_path: Path
) -> None:
    alike = tiny_bundle(tmp_path / "alike", rest_seed=7)
    packed = PackedModel(bundle, bundle.model(), batch_tokens=2048)
    packed.attach(BundlePlace(alike.folder, alike.id))()
    works = [(one, group) for one in (bundle, alike, bundle, alike) for group in groups_of(one)]
    for _ in range(2):  # the second time out of the caches
        outcomes = packed.score([group for _, group in works], [one.id for one, _ in works])
        for (one, group), got in zip(works, outcomes, strict=True):
            assert not isinstance(got, JobFailedError)
            np.testing.assert_allclose(got, reference(model, one, group), atol=1e-5)
    # The same vectors under other projections are another prompt.
    [ours, theirs] = scores(packed.score([works[0][1]] * 2, [bundle.id, alike.id]))
    assert np.abs(ours - theirs).max() > 1e-3
    packed.detach(bundle.id)  # the first one is not special
    lost, kept = packed.score([works[0][1], works[-1][1]], [bundle.id, alike.id])
    assert isinstance(lost, JobFailedError) and "not loaded" in str(lost)
    np.testing.assert_allclose(np.asarray(kept), reference(model, alike, works[-1][1]), atol=1e-5)


def test_a_bundle_that_does_not_fit_or_is_altered_is_not_attached(bundle: Bundle, tmp_path: Path) -> None:
    packed = PackedModel(bundle, bundle.model(), batch_tokens=2048)
    other = tiny_bundle(tmp_path / "other", seed=3)
    with pytest.raises(BundleError, match="merged weights are not those"):
        packed.attach(BundlePlace(other.folder, other.id))
    alike = tiny_bundle(tmp_path / "alike", rest_seed=7)
    with pytest.raises(BundleError, match="holds bundle"):
        packed.attach(BundlePlace(alike.folder, "0" * 64))
    (alike.folder / "projection.safetensors").write_bytes(b"\0" * alike.manifest.files["projection.safetensors"].size)
    with pytest.raises(BundleError, match=r"projection\.safetensors: altered"):
        packed.attach(BundlePlace(alike.folder, alike.id))


def test_a_worker_starts_with_the_bundles_that_are_whole(bundle: Bundle, tmp_path: Path) -> None:
    alike = tiny_bundle(tmp_path / "alike", rest_seed=7)
    places = tuple(BundlePlace(one.folder, one.id) for one in (alike, bundle))
    source = PackedSource(places, "cpu", 1, 1024, 0)
    [group] = groups_of(bundle)[:1]
    both = source.open().score([group, group], [bundle.id, alike.id])
    assert len(scores(both)) == 2
    (alike.folder / "fusion.json").unlink()
    good, bad = source.open().score([group, group], [bundle.id, alike.id])
    assert isinstance(bad, JobFailedError) and "fusion.json: missing" in str(bad)
    np.testing.assert_allclose(np.asarray(good), np.asarray(both[0]), atol=1e-6)


def groups_of(bundle: Bundle) -> list[ScoringGroup]:
    tables = bundle.tables()
    assembler = bundle.assembler(bundle.encoder(), tables)
    items = [item for i in range(5) if (item := tables.item(f"i{i}")) is not None]
    return [assembler.group(assembler.user(tables.user(f"u{i}"), items[:i], i), items[: i + 2]) for i in range(3)]


def reference(model: ScoringModel, bundle: Bundle, group: ScoringGroup) -> list[float]:
    """Each candidate alone by `models.scorer`; both bundles have this model's backbone."""
    return [
        logit(
            model.backbone,
            group.pack.trunk + branch.segment,
            bundle.projections(),
            {
                SlotKind.USER: torch.from_numpy(group.user_1C[0]),
                SlotKind.ITEM: torch.from_numpy(item_C),
                SlotKind.WARM: torch.from_numpy(semantic_D),
            },
        )
        for branch, item_C, semantic_D in zip(group.pack.branches, group.item_KC, group.semantic_KD, strict=True)
    ]


@pytest.fixture(scope="module")
def proof(bundle: Bundle) -> ScoringGroup:
    return open_parts(bundle).proof


@pytest.mark.parametrize("dtype", [None, "bfloat16", "fp8"])
def test_the_path_that_will_serve_is_compared_with_the_reference(
    bundle: Bundle, proof: ScoringGroup, dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bundle.model(dtype=dtype)
    packed = PackedModel(bundle, model, 1024, places=[BundlePlace(bundle.folder, bundle.id, proof)])
    packed.warm_up()
    hidden = model._packed.hidden

    def collapsed(row: Row, embeds: torch.Tensor) -> torch.Tensor:
        return hidden(row, embeds).mean(0, keepdim=True).expand(len(row.layout.own.answers_N), -1)

    def off(row: Row, embeds: torch.Tensor) -> torch.Tensor:
        return 30 * hidden(row, embeds)

    for wrong in (collapsed, off):
        model.forget()
        monkeypatch.setattr(model._packed, "hidden", wrong)
        with pytest.raises(BundleError, match="the prompt that proves it: its logits"):
            packed.warm_up()


def test_projections_that_overflow_are_not_attached(bundle: Bundle, tmp_path: Path) -> None:
    """Every number of the file is finite: only a scored prompt shows it."""
    packed = PackedModel(bundle, bundle.model(), batch_tokens=2048)
    change = tensors("projection.safetensors", warm__linear__weight=lambda held: np.full_like(held, 3e38))
    forged = forge(bundle, tmp_path / "forged", change)
    serve = packed.attach(BundlePlace(forged.folder, forged.id, open_parts(forged).proof))
    with pytest.raises(BundleError, match="not finite"):
        serve()
    [group] = groups_of(bundle)[:1]
    lost, kept = packed.score([group, group], [forged.id, bundle.id])
    assert isinstance(lost, JobFailedError) and not isinstance(kept, JobFailedError)


def test_a_worker_goes_on_to_the_next_bundle_where_the_first_one_s_weights_are_others(
    bundle: Bundle, tmp_path: Path
) -> None:
    def change(folder: Path) -> None:
        fields = json.loads((folder / "backbone" / "config.json").read_text())
        (folder / "backbone" / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 0.5}))

    forged = forge(bundle, tmp_path / "forged", change)
    places = tuple(BundlePlace(one.folder, one.id) for one in (forged, bundle))
    model = PackedSource(places, "cpu", 1, 1024, 0).open()
    [group] = groups_of(bundle)[:1]
    lost, kept = model.score([group, group], [forged.id, bundle.id])
    assert isinstance(lost, JobFailedError) and "weights are not those" in str(lost)
    assert not isinstance(kept, JobFailedError)


def test_logits_that_fp32_rounds_to_one_probability_stay_apart_and_an_infinite_one_is_an_error(
    bundle: Bundle, groups: list[ScoringGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bundle.model()
    packed, answer_logits = PackedModel(bundle, model, 1024), model.backbone.answer_logits
    [plain] = scores(packed.score(groups[3:]))
    monkeypatch.setattr(model.backbone, "answer_logits", lambda hidden_KD: 20 + answer_logits(hidden_KD))
    [large] = scores(packed.score(groups[3:]))
    np.testing.assert_allclose(large, 20 + plain, atol=1e-5)
    assert len(np.unique(large)) == len(plain) > 3
    monkeypatch.setattr(model.backbone, "answer_logits", lambda hidden_KD: answer_logits(hidden_KD) / 0.0)
    [outcome] = packed.score(groups[3:])
    assert isinstance(outcome, JobFailedError) and "not finite" in str(outcome)
