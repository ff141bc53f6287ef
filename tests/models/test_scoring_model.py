import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.assembly import Assembler, history_window
from models.features import Tables
from models.loading import Bundle
from models.packs import ScoringGroup
from models.scorer import score
from models.scoring_model import NotFiniteError, ScoringModel
from models.segments import SlotKind
from tests.tiny import tiny_bundle


def group_for(assembler: Assembler, tables: Tables, user_id: str, candidates: list[str]) -> ScoringGroup:
    user = tables.user(user_id)
    total = user.history_total if user else 0
    window = history_window(user.history if user else (), total, assembler.template)
    items = {one: tables.item(one) for one in (*window, *candidates)}
    assembled = assembler.user(user, [found for one in window if (found := items[one])], total)
    return assembler.group(assembled, [found for one in candidates if (found := items[one])])


def reference(model: ScoringModel, group: ScoringGroup) -> list[float]:
    return [
        score(
            model.backbone,
            group.pack.trunk + branch.segment,
            model.projections,
            {
                SlotKind.USER: torch.from_numpy(group.user_1C[0]),
                SlotKind.ITEM: torch.from_numpy(group.item_KC[index]),
                SlotKind.WARM: torch.from_numpy(group.semantic_KD[index]),
            },
        )
        for index, branch in enumerate(group.pack.branches)
    ]


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([f"u{i}" for i in range(20)] + ["nobody"]),
            st.lists(st.integers(0, 39), min_size=1, max_size=20, unique=True),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([64, 500, 4096]),
)
def test_groups_score_as_the_reference_whatever_shares_their_forward(
    model: ScoringModel,
    assembler: Assembler,
    tables: Tables,
    requests: list[tuple[str, list[int]]],
    max_tokens: int,
) -> None:
    groups = [group_for(assembler, tables, user, [f"i{row}" for row in rows]) for user, rows in requests]
    for group, ours in zip(groups, model.score(groups, max_tokens), strict=True):
        np.testing.assert_allclose(ours, reference(model, group), atol=1e-5)


def test_scores_differ_between_users_and_items(model: ScoringModel, assembler: Assembler, tables: Tables) -> None:
    """A model that ignored its vectors would pass every comparison with itself."""
    same_text = group_for(assembler, tables, "u1", ["i1", "i2"])
    other_vector = ScoringGroup(same_text.pack, -same_text.user_1C, same_text.item_KC, same_text.semantic_KD)
    first, second = model.score([same_text, other_vector])
    assert abs(first - second).min() > 1e-4
    assert abs(first[0] - first[1]) > 1e-4


def test_distilled_vectors_are_the_models_own_last_states(
    model: ScoringModel, assembler: Assembler, tables: Tables
) -> None:
    prompts = [assembler.template.distil(assembler.title(title)) for title in tables.titles[:12]]
    ours = model.distil(prompts, max_tokens=60)
    for prompt, vector in zip(prompts, ours, strict=True):
        out = model.backbone.causal_lm.base_model(input_ids=torch.tensor([prompt.token_ids]))
        np.testing.assert_allclose(vector, out.last_hidden_state[0, -1].detach().numpy(), atol=1e-5)


def test_a_vector_that_is_not_finite_is_an_error_not_a_score(
    model: ScoringModel, assembler: Assembler, tables: Tables
) -> None:
    good = group_for(assembler, tables, "u1", ["i1"])
    bad = ScoringGroup(good.pack, good.user_1C * np.float32("nan"), good.item_KC, good.semantic_KD)
    with pytest.raises(NotFiniteError, match="group 1"):
        model.score([good, bad])


def test_bf16_scores_stay_near_fp32(bundle: Bundle, assembler: Assembler, tables: Tables) -> None:
    group = group_for(assembler, tables, "u1", [f"i{row}" for row in range(40)])
    exact, rounded = bundle.model().score([group])[0], bundle.model(dtype="bfloat16").score([group])[0]
    assert abs(exact - rounded).max() < 0.1  # random weights are wider than trained ones
    assert np.corrcoef(exact, rounded)[0, 1] > 0.99


def test_a_backbone_other_than_the_bundles_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    from models.bundle import BundleError, Manifest, write_bundle

    folder = tmp_path_factory.mktemp("swap")
    ours, other = tiny_bundle(folder / "ours"), tiny_bundle(folder / "other", seed=9)
    entry = ours.manifest.backbone.model_copy(update={"source": str(other.folder / "backbone")})

    def fill(target: object) -> None:
        import shutil
        from pathlib import Path

        shutil.copytree(
            ours.folder, Path(str(target)), dirs_exist_ok=True, ignore=lambda *_: ["manifest.json", "model.safetensors"]
        )

    def manifest(files: dict) -> Manifest:  # type: ignore[type-arg]
        return ours.manifest.model_copy(update={"backbone": entry, "files": files})

    write_bundle(folder / "mixed", manifest, fill)
    with pytest.raises(BundleError, match="not those the bundle was trained on"):
        Bundle.open(folder / "mixed").model()
