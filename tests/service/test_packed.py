from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from models.bundle import BundleError
from models.loading import Bundle
from models.packs import ScoringGroup
from models.scoring_model import ScoringModel
from models.segments import Segment
from service.engines.packed import PackedModel, PackedSource
from service.engines.protocol import JobFailedError


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
    monkeypatch.setattr(model, "score", lambda groups, max_tokens: [][0])
    with pytest.raises(JobFailedError):
        packed.warm_up()


def test_a_bundle_that_changed_since_is_refused(bundle: Bundle) -> None:
    source = PackedSource(bundle.folder, "0" * 64, "cpu", None, 1024, 0)
    with pytest.raises(BundleError, match="holds bundle"):
        source.open()
