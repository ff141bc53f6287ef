import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from models.backbone import Backbone
from models.fusion import Rates
from models.projection import Projections
from models.prompt_tree import TreeModel
from tests.training.micro import Trained
from training.examples import Examples, RowsByItem, forwards
from training.prediction import figures
from training.run import Run, read_tensors
from training.stages.adapt import KIND as KIND_1
from training.stages.adapt import adapt, leniency, step_parts
from training.stages.align import Collab, align
from training.stages.influence import Influence, influence
from training.stages.project import (
    KIND,
    LM_WEIGHT,
    Head,
    Projected,
    SlotForward,
    SlotTables,
    collab_predictions,
    folded_users,
    initial_head,
    initial_projections,
    project,
)
from training.stages.text_prior import users_of_labels

Runs = Callable[..., Run]
SCHEDULE = {"epochs": 0.5, "learning_rate": 0.003}


def file_hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def last_parameters(checkpoint: Path) -> dict[str, Tensor]:
    """Return a stage's parameters after its last step: the kept ones may be those of the start."""
    tensors, _ = read_tensors(checkpoint)
    return {name.removeprefix("now/"): one for name, one in tensors.items() if name.startswith("now/")}


def train(run: Run, examples: Examples, merged: Backbone, collab: Collab) -> Projected:
    return project(run, examples, merged, collab, initial_projections(run, merged, collab))


def slots(run: Run, examples: Examples, merged: Backbone, collab: Collab) -> SlotForward:
    """Return stage 3's forward before its first step."""
    targets = examples.targets("train", 16)
    folded = {"train": folded_users(examples, targets, collab)}
    projections, head = initial_projections(run, merged, collab), Head(0.0, 0.0, 1.0)
    return SlotForward(run, TreeModel(merged), projections, SlotTables(collab), head, folded)


@pytest.fixture(scope="module")
def moved(
    new_run: Runs, examples: Examples, merged: Backbone, collab: Collab, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """Stage 3's parameters after its last step."""
    folder = tmp_path_factory.mktemp("project")
    train(new_run(folder, project={"schedule": SCHEDULE, "form": "paper"}), examples, merged, collab)
    return last_parameters(folder / "project.safetensors")


def test_stage_1_changes_the_adapter_alone(new_run: Runs, trained: Trained, examples: Examples, tmp_path: Path) -> None:
    before = file_hashes(trained.folder / "backbone")
    run = new_run(tmp_path, adapt={"rank": 4, "alpha": 8, "schedule": SCHEDULE})
    adapt(run, examples, trained.folder / "backbone")
    assert file_hashes(trained.folder / "backbone") == before
    after = last_parameters(tmp_path / "adapt.safetensors")
    assert after and all("lora_" in name for name in after)
    # LoRA's B starts at zero: every layer has been reached by gradients.
    assert all(one.abs().sum() > 0 for name, one in after.items() if "lora_B" in name)
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118


def test_a_row_is_no_evidence_of_its_own_users_leniency(examples: Examples) -> None:
    train, rates = examples.targets("train", 16), Rates(base=0.5, user_strength=4.0)
    offset_B = leniency(train, rates)
    for row in range(0, len(train), 97):
        others = (train.user_B == train.user_B[row]) & (np.arange(len(train)) != row)
        hits, shown = train.label_B[others].sum(), others.sum()
        assert offset_B[row] == pytest.approx(np.log((hits + 2) / (shown - hits + 2)), abs=1e-5)
    flipped = replace(train, label_B=np.where(np.arange(len(train)) == 5, 1 - train.label_B, train.label_B))
    changed_B = leniency(flipped, rates) != offset_B
    assert changed_B.tolist() == ((train.user_B == train.user_B[5]) & (np.arange(len(train)) != 5)).tolist()


def test_a_step_of_stage_1_asks_its_rows_and_every_row_of_its_titles(
    new_run: Runs, examples: Examples, tmp_path: Path
) -> None:
    run, train = new_run(tmp_path, max_targets=3, max_tokens=500), examples.targets("train", 16)
    by_item = RowsByItem(train)
    groups, items = train.groups[:5], by_item.items[[7, 1, 4, 30]]
    parts = step_parts(run, examples, train, by_item, groups, items)
    asked = {}
    for part in parts:
        answers = [(pack, branch) for pack, _ in part.batch for branch in pack.branches]
        for row, place in zip(part.rows_N.tolist(), part.answer_N.tolist(), strict=True):
            pack, branch = answers[place]
            asked[row, part.total] = pack.trunk.token_ids[: branch.attach] + branch.segment.token_ids
    rows, of_titles = np.concatenate(groups), np.flatnonzero(np.isin(train.item_B, items))
    totals = [2.0 * len(rows), 2.0 * len(of_titles)]
    assert sorted(asked) == sorted([(row, totals[0]) for row in rows] + [(row, totals[1]) for row in of_titles])
    for (row, total), seen in asked.items():
        alone = examples.title_pack(train.item_B[row : row + 1])
        if total == totals[0]:
            alone = examples.pack(KIND_1, train, np.array([row]))
        [branch] = alone.branches
        assert seen == alone.trunk.token_ids[: branch.attach] + branch.segment.token_ids
    alone = step_parts(run, examples, train, by_item, groups, items[:0])
    assert [part.total for part in alone] == [len(rows)] * len(alone)


def test_the_language_models_weight_stays_positive_and_can_always_grow() -> None:
    head, lm_K, collab_K = Head(4.0, 0.0, LM_WEIGHT), torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.5])
    with torch.no_grad():
        head.lm_weight.fill_(-3.0)
    torch.testing.assert_close(head(lm_K, collab_K), 2.0 + LM_WEIGHT * lm_K)
    head(lm_K, collab_K)[0].backward()
    assert head.lm_weight.grad is not None and float(head.lm_weight.grad) == 2.0
    head.keep_positive()
    assert float(head.lm_weight.detach()) == pytest.approx(LM_WEIGHT)


def test_an_adapter_says_nothing_of_where_it_was_trained(trained: Trained) -> None:
    """The bundle's id must not depend on a path, nor on the order in which PEFT writes a set."""
    text = (trained.bundle / "adapter" / "adapter_config.json").read_text()
    assert str(trained.folder) not in text
    names = [line.strip(' ",') for line in text.splitlines() if "_proj" in line]
    assert len(names) == 14 and names == sorted(names)


def test_stages_2_and_3_leave_the_language_model_as_it_is_bit_for_bit(
    new_run: Runs, trained: Trained, examples: Examples, merged: Backbone, semantic_vectors: Tensor, tmp_path: Path
) -> None:
    before, files = merged.weights_id(), file_hashes(trained.folder / "adapter")
    run = new_run(tmp_path)
    train(run, examples, merged, align(run, examples, semantic_vectors))
    assert merged.weights_id() == before
    assert file_hashes(trained.folder / "adapter") == files
    assert not any(one.requires_grad or one.grad is not None for one in merged.model.parameters())


def test_stage_3_changes_both_projections_and_every_table(
    new_run: Runs, merged: Backbone, collab: Collab, moved: dict[str, Tensor], tmp_path: Path
) -> None:
    start = initial_projections(new_run(tmp_path), merged, collab)
    for name, one in start.named_parameters():
        assert not torch.equal(moved[f"projections.{name}"], one.detach()), name
    assert moved["tables.user_delta_UC"].abs().sum() > 0
    assert moved["tables.item_delta_IC"].abs().sum() > 0
    assert moved["tables.semantic_delta_ID"].abs().sum() > 0


def test_stage_3_never_moves_a_row_without_training_data(collab: Collab, moved: dict[str, Tensor]) -> None:
    for name, cold in (
        ("tables.user_delta_UC", ~collab.user_trained_U),
        ("tables.item_delta_IC", ~collab.item_trained_I),
        ("tables.semantic_delta_ID", ~collab.item_trained_I),
    ):
        assert cold.any() and moved[name][cold].abs().sum() == 0, name


def test_gradients_reach_the_vectors_of_the_batch_and_no_others(
    new_run: Runs, examples: Examples, merged: Backbone, collab: Collab, tmp_path: Path
) -> None:
    run = new_run(tmp_path, autocast=False)
    forward = slots(run, examples, merged, collab)
    targets = examples.targets("train", 16)
    rows = [one for one in targets.groups if len(one) > 2][:3]
    [batch] = forwards([(examples.pack(KIND, targets, one), one) for one in rows], 10**6)
    forward(targets, batch).sum().backward()
    tables, chosen = forward.tables, np.concatenate(rows)
    for table, reached in (
        (tables.user_delta_UC, targets.user_B[chosen]),
        (tables.item_delta_IC, targets.item_B[chosen]),
        (tables.semantic_delta_ID, targets.item_B[chosen]),
    ):
        assert table.grad is not None
        assert sorted(set(reached.tolist())) == table.grad.abs().sum(1).nonzero().flatten().tolist()
    for name, one in forward.projections.named_parameters():
        assert one.grad is not None and one.grad.abs().sum() > 0, name
    assert all(one.grad is None for one in merged.model.parameters())


def test_cold_targets_get_their_substitutes_and_the_others_their_own(collab: Collab) -> None:
    torch.manual_seed(0)
    tables = SlotTables(collab)
    for delta in tables.parameters():
        delta.data.normal_()
    users_K, items_K = torch.arange(8), torch.arange(8)
    users_K[-1] = int((~collab.user_trained_U).nonzero()[0])
    items_K[-1] = int((~collab.item_trained_I).nonzero()[0])
    assert collab.user_trained_U[users_K[:-1]].all() and collab.item_trained_I[items_K[:-1]].all()
    folded_KC = torch.randn(8, collab.user_vectors_UC.shape[1])
    cold_user_K = torch.tensor([0, 1, 0, 1, 0, 1, 0, 0]).bool()
    cold_item_K = torch.tensor([0, 0, 1, 1, 0, 0, 1, 0]).bool()
    vectors = tables.vectors(users_K, items_K, folded_KC, cold_user_K, cold_item_K)
    mapped_IC = torch.from_numpy(collab.text_map(collab.semantic_ID.numpy()))
    for k in range(8):
        user, item = users_K[k], items_K[k]
        cold_user, cold_item = bool(cold_user_K[k]) or k == 7, bool(cold_item_K[k]) or k == 7
        own_user_C = collab.user_vectors_UC[user] + tables.user_delta_UC[user]
        own_item_C = collab.item_vectors_IC[item] + tables.item_delta_IC[item]
        learned_D = collab.semantic_delta_ID[item] + tables.semantic_delta_ID[item]
        own_semantic_D = collab.semantic_ID[item] + learned_D
        assert torch.equal(vectors.user_UC[k], folded_KC[k] if cold_user else own_user_C)
        assert torch.equal(vectors.item_KC[k], mapped_IC[item] if cold_item else own_item_C)
        assert torch.equal(vectors.semantic_KD[k], collab.semantic_ID[item] if cold_item else own_semantic_D)


def test_decay_pulls_every_table_back_to_what_stage_2_left(collab: Collab) -> None:
    tables = SlotTables(collab)
    before = tables.final()
    assert collab.semantic_delta_ID.abs().sum() > 0
    optimizer = torch.optim.AdamW(tables.parameters(), lr=0.1, weight_decay=10.0)
    for delta in tables.parameters():
        delta.grad = torch.zeros_like(delta)
    optimizer.step()
    assert all(torch.equal(one, before[name]) for name, one in tables.final().items())


def test_what_own_labels_did_is_left_out_of_trained_vectors_alone(collab: Collab) -> None:
    tables = SlotTables(collab)
    users_K, items_K = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2])
    cold_user_K, cold_item_K = torch.tensor([0, 1, 0]).bool(), torch.tensor([0, 0, 1]).bool()
    width = collab.user_vectors_UC.shape[1]
    folded_KC, own_label = torch.randn(3, width), Influence(torch.randn(3, width), torch.randn(3, width))
    whole = tables.vectors(users_K, items_K, folded_KC, cold_user_K, cold_item_K)
    without = tables.vectors(users_K, items_K, folded_KC, cold_user_K, cold_item_K, own_label)
    torch.testing.assert_close(without.user_UC, whole.user_UC - own_label.user_BC * ~cold_user_K[:, None])
    torch.testing.assert_close(without.item_KC, whole.item_KC - own_label.item_BC * ~cold_item_K[:, None])
    assert torch.equal(without.semantic_KD, whole.semantic_KD)


@pytest.mark.parametrize(
    ("shares", "still"),
    [
        ({"cold_users": 1.0, "cold_items": 0.0}, {"user_vectors"}),
        ({"cold_users": 0.0, "cold_items": 1.0}, {"item_vectors", "semantic"}),
    ],
)
def test_what_is_always_dropped_is_never_trained(
    new_run: Runs,
    examples: Examples,
    merged: Backbone,
    collab: Collab,
    tmp_path: Path,
    shares: dict[str, float],
    still: set[str],
) -> None:
    run = new_run(tmp_path, project={**shares, "form": "paper", "schedule": {"epochs": 0.3, "learning_rate": 0.003}})
    train(run, examples, merged, collab)
    now = last_parameters(tmp_path / "project.safetensors")
    changed = {
        "user_vectors": now["tables.user_delta_UC"].abs().sum() > 0,
        "item_vectors": now["tables.item_delta_IC"].abs().sum() > 0,
        "semantic": now["tables.semantic_delta_ID"].abs().sum() > 0,
    }
    assert {name for name, moved in changed.items() if not moved} == still


def test_the_served_tables_are_what_a_forward_without_dropout_sees(collab: Collab) -> None:
    torch.manual_seed(0)
    tables = SlotTables(collab)
    for delta in tables.parameters():
        delta.data.normal_()
    final = tables.final()
    items = torch.arange(len(collab.item_trained_I))
    nobody = torch.zeros(len(items), dtype=torch.bool)
    folded = torch.zeros(len(items), collab.user_vectors_UC.shape[1])
    vectors = tables.vectors(torch.zeros_like(items), items, folded, nobody, nobody)
    assert torch.equal(final["item_vectors"], vectors.item_KC)
    assert torch.equal(final["semantic"], vectors.semantic_KD)
    trained = collab.user_trained_U
    assert torch.equal(final["user_vectors"][trained], (collab.user_vectors_UC + tables.user_delta_UC)[trained])
    assert torch.equal(final["user_vectors"][~trained], collab.user_vectors_UC[~trained])


def test_projections_start_as_stage_2s_around_the_embedding_of_a_full_stop(
    new_run: Runs, merged: Backbone, collab: Collab, tmp_path: Path
) -> None:
    run = new_run(tmp_path, project={"slot_scale": 0.7})
    projections = initial_projections(run, merged, collab)
    users, items = collab.user_vectors_UC[collab.user_trained_U], collab.item_vectors_IC[collab.item_trained_I]
    inputs, distance = torch.cat([users, items]), 0.7 * merged.embedding_norm()
    [full_stop] = merged.encoder.encode(".")
    neutral = merged.causal_lm.get_input_embeddings().weight[full_stop].detach().float()
    with torch.no_grad():
        ours, stage_2 = projections.collab(inputs), collab.projection(inputs)
        stage_2 = stage_2 - stage_2.mean(0)
        scale = distance / stage_2.norm(dim=-1).mean()
        torch.testing.assert_close(ours - neutral, stage_2 * scale, rtol=1e-3, atol=1e-3 * distance)
        warm = projections.warm(collab.semantic_ID) - neutral
        assert float(warm.norm(dim=-1).mean()) == pytest.approx(distance, rel=1e-4)
        assert float(warm.mean(0).norm()) < 1e-3 * distance


def test_the_correction_begins_at_stage_2_and_never_ends_below_it(
    new_run: Runs, examples: Examples, merged: Backbone, collab: Collab, tmp_path: Path
) -> None:
    run = new_run(tmp_path, project={"schedule": SCHEDULE, "slot_scale": 0.5})
    result = train(run, examples, merged, collab)
    valid = examples.targets("valid", 16)
    stage_2 = figures(collab_predictions(examples, collab, valid), valid)
    assert run.config.project.form == "correction"
    assert result.evaluations[0]["auc"] == pytest.approx(stage_2["auc"], abs=0.01)
    assert figures(result.valid_logits_B, valid)["auc"] >= stage_2["auc"] - 1e-6
    now = last_parameters(tmp_path / "project.safetensors")
    assert float(now["head.lm_weight"]) != LM_WEIGHT
    start = initial_projections(run, merged, collab)
    for name, one in start.named_parameters():
        assert not torch.equal(now[f"projections.{name}"], one.detach()), name
    assert torch.equal(result.tables["user_vectors"], collab.user_vectors_UC)
    assert torch.equal(result.tables["item_vectors"], collab.item_vectors_IC)


def test_the_head_starts_without_what_own_labels_did(
    new_run: Runs, examples: Examples, collab: Collab, tmp_path: Path
) -> None:
    """With them, stage 2 is more certain on its own train rows than on other rows."""
    run, train_rows = new_run(tmp_path), examples.targets("train", 16)
    own_label = influence(collab.user_vectors_UC, collab.item_vectors_IC, train_rows, run.config.align)
    nothing = Influence(torch.zeros_like(own_label.user_BC), torch.zeros_like(own_label.item_BC))
    slope, biased = (initial_head(run, collab, train_rows, one).slope.item() for one in (own_label, nothing))
    assert 0 < slope < biased


def test_the_head_starts_with_a_positive_slope_whatever_train_holds(
    new_run: Runs, examples: Examples, collab: Collab, tmp_path: Path
) -> None:
    run, rows = new_run(tmp_path), examples.targets("train", 16)
    own_label = influence(collab.user_vectors_UC, collab.item_vectors_IC, rows, run.config.align)
    one_class = replace(rows, label_B=np.ones_like(rows.label_B))
    against = replace(rows, label_B=1 - rows.label_B)  # stage 2's predictions are worse than chance
    for targets in (one_class, against):
        head = initial_head(run, collab, targets, own_label)
        assert head.slope.item() > 0 and np.isfinite(head.intercept.item())


def test_the_scale_of_the_weights_changes_no_vector(
    examples: Examples, collab: Collab, new_run: Runs, tmp_path: Path
) -> None:
    rows, config = examples.targets("train", 16), new_run(tmp_path).config.align
    tiny = replace(rows, weight_B=rows.weight_B * np.float32(1e-6))
    users, items = collab.user_vectors_UC.numpy(), collab.item_vectors_IC.numpy()
    ours, theirs = (users_of_labels(users, items, one, config) for one in (rows, tiny))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    ours, theirs = (
        influence(collab.user_vectors_UC, collab.item_vectors_IC, one, config).user_BC for one in (rows, tiny)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_fresh_projection_knows_nothing_of_stage_2(
    new_run: Runs, merged: Backbone, collab: Collab, tmp_path: Path
) -> None:
    run = new_run(tmp_path)
    blank = replace(collab, projection=Projections(*Projections(8, 16, merged.d_model).sizes).collab)
    fresh = initial_projections(run, merged, collab, fresh_collab=True)
    of_blank = initial_projections(run, merged, blank, fresh_collab=True)
    warm = initial_projections(run, merged, collab)
    assert all(torch.equal(one, other) for one, other in zip(fresh.parameters(), of_blank.parameters(), strict=True))
    assert not torch.equal(fresh.collab.inner.weight, warm.collab.inner.weight)
    assert torch.equal(fresh.warm.linear.weight, warm.warm.linear.weight)


def test_a_folded_user_depends_on_the_window_alone(examples: Examples, collab: Collab) -> None:
    valid = examples.targets("valid", 16)
    folded_BC = folded_users(examples, valid, collab)
    items_IC: Any = collab.item_vectors_IC.numpy()
    for row in range(0, len(valid), 7):
        wanted = collab.prior.fold_in(items_IC[examples.window(valid, row)])
        np.testing.assert_array_equal(folded_BC[row].numpy(), wanted)
    empty = [row for row in range(len(valid)) if not len(examples.window(valid, row))]
    assert empty and torch.equal(folded_BC[empty[0]], torch.from_numpy(collab.prior.mean_C))
