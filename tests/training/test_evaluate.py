from collections.abc import Callable
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from models.assembly import known_pairs
from models.backbone import Backbone
from models.fusion import Counts
from models.prompt_tree import TreeModel
from tests.training.micro import Trained
from training.counts import LIVE, row_counts, row_outcomes
from training.data.dataset import Dataset, load_dataset
from training.data.history import Histories, build_histories
from training.evaluate import Scorer, cold_rows, judge, score_split
from training.examples import Examples
from training.pipeline import Prepared, _scorer
from training.run import Run
from training.stages.align import Collab
from training.stages.project import Head, SlotForward, SlotTables, folded_users, initial_projections


@pytest.fixture(scope="module")
def raw_valid(scorer: Scorer, dataset: Dataset, histories: Histories) -> np.ndarray:
    return score_split(scorer, dataset, histories, "valid", 2048).raw_B


def logit(probability: np.ndarray) -> np.ndarray:
    precise = probability.astype(np.float64)
    return np.log(precise) - np.log1p(-precise)


@pytest.fixture(scope="module")
def stage_3(
    new_run: Callable[..., Run], trained: Trained, merged: Backbone, examples: Examples, collab: Collab
) -> SlotForward:
    """Stage 3's forward in float32, its tables moved far from stage 2's, in the cold rows as well."""
    run = new_run(trained.folder, autocast=False)
    tables = SlotTables(collab)
    torch.manual_seed(0)
    for delta in tables.parameters():
        delta.data += 0.3 * torch.randn_like(delta)
    folded = {"valid": folded_users(examples, examples.targets("valid", 16), collab)}
    projections, head = initial_projections(run, merged, collab), Head(0.0, 0.0, 1.0)
    return SlotForward(run, TreeModel(merged), projections, tables, head, folded)


@pytest.fixture(scope="module")
def served(stage_3: SlotForward, trained: Trained, examples: Examples, histories: Histories, collab: Collab) -> Scorer:
    """The same as the bundle would hold it."""
    prepared = Prepared(
        None, trained.folder / "adapter", "float32", stage_3.model.backbone, examples, collab.semantic_ID
    )
    return _scorer(stage_3.run, prepared, histories, collab, stage_3.tables.final(), stage_3.projections)


def test_the_served_score_is_what_stage_3_trained_cold_rows_included(
    stage_3: SlotForward, served: Scorer, examples: Examples, dataset: Dataset, histories: Histories
) -> None:
    """Tables and prompts by the service's code, against the training forward on the same rows."""
    logits_B = logit(score_split(served, dataset, histories, "valid", 2048).raw_B)
    np.testing.assert_allclose(logits_B, stage_3.predict(examples, examples.targets("valid", 16)), atol=1e-4)
    cold_user_B, cold_item_B = cold_rows(dataset, "valid", served.tables)
    assert (cold_user_B & ~cold_item_B).sum() > 5 and (~cold_user_B & cold_item_B).sum() > 5
    assert logits_B[cold_user_B].std() > 1e-3 and logits_B[cold_item_B].std() > 1e-3


def test_users_are_folded_in_by_the_item_table_of_stage_2(served: Scorer, collab: Collab) -> None:
    """Stage 3 moves the vectors behind <Item_ID>; the prior was fitted on those before it."""
    np.testing.assert_array_equal(served.tables.fold_vectors_IC, collab.item_vectors_IC.numpy())
    assert not np.allclose(served.tables.item_vectors_IC, served.tables.fold_vectors_IC)


def test_scores_do_not_use_the_stored_last_histories(
    scorer: Scorer, dataset: Dataset, histories: Histories, raw_valid: np.ndarray
) -> None:
    """What the bundle stores happened after the rows that are judged: it would leak their labels."""
    users = len(scorer.tables.user_ids)
    other = replace(scorer.tables, histories=[("m01",)] * users, history_totals=[1] * users)
    without = score_split(replace(scorer, tables=other), dataset, histories, "valid", 2048)
    np.testing.assert_array_equal(without.raw_B, raw_valid)


def test_a_score_does_not_depend_on_what_came_later(scorer: Scorer, dataset: Dataset, raw_valid: np.ndarray) -> None:
    early = dataset.splits["valid"].head(90)
    cut = Dataset(dataset.items, {"train": dataset.splits["train"], "valid": early})
    again = score_split(scorer, cut, build_histories(cut), "valid", 2048)
    np.testing.assert_allclose(again.raw_B, raw_valid[:90], atol=1e-6)


def test_a_score_does_not_depend_on_its_own_label(scorer: Scorer, dataset: Dataset, raw_valid: np.ndarray) -> None:
    valid = dataset.splits["valid"]
    last = valid.with_row_index("row").group_by("user_id").agg(pl.col("row").last())["row"].to_numpy()
    flipped = valid["label"].to_numpy().copy()
    flipped[last] = 1 - flipped[last]
    turned = Dataset(
        dataset.items, {**dataset.splits, "valid": valid.with_columns(label=pl.Series(flipped, dtype=pl.Int8))}
    )
    again = score_split(scorer, turned, build_histories(turned), "valid", 2048).raw_B
    np.testing.assert_allclose(again[last], raw_valid[last], atol=1e-6)


def test_the_forwards_size_does_not_change_a_score(
    scorer: Scorer, dataset: Dataset, histories: Histories, raw_valid: np.ndarray
) -> None:
    again = score_split(scorer, dataset, histories, "valid", 150)
    np.testing.assert_allclose(again.raw_B, raw_valid, atol=1e-5)


def test_users_and_items_the_bundle_never_heard_of_are_scored_from_history_and_title(
    scorer: Scorer, dataset: Dataset
) -> None:
    items = pl.concat([dataset.items, pl.DataFrame({"item_id": ["new"], "title": ["A Title Nobody Knows"]})])
    train = dataset.splits["train"]
    rows = pl.DataFrame(
        {"user_id": ["stranger"] * 3, "item_id": ["m01", "m02", "new"], "label": [1, 0, 1], "timestamp": [1, 2, 3]}
    ).with_columns(weight=pl.lit(1.0))
    test = rows.cast({name: train.schema[name] for name in train.columns})
    strange = Dataset(items, {"test": test})
    scored = score_split(scorer, strange, build_histories(strange), "test", 2048)
    scores = scored.raw_B
    assert np.isfinite(scores).all() and len(set(scores.tolist())) == 3
    cold_user_B, cold_item_B = cold_rows(strange, "test", scorer.tables)
    assert cold_user_B.all() and cold_item_B[-1]
    assert scored.cold_user_B.all() and scored.cold_item_B.tolist() == cold_item_B.tolist()


def test_warm_means_user_and_item_both_in_train(trained: Trained, scorer: Scorer, histories: Histories) -> None:
    whole = load_dataset(trained.data)
    train, test = whole.splits["train"], whole.splits["test"]
    seen_users, seen_items = set(train["user_id"]), set(train["item_id"])
    warm_B = np.array(
        [user in seen_users and item in seen_items for user, item in test.select("user_id", "item_id").iter_rows()]
    )
    assert 20 < warm_B.sum() < len(warm_B) - 20
    scores_B, labels_B = np.random.default_rng(0).random(len(warm_B)).astype(np.float32), test["label"].to_numpy()
    report = judge({"score": scores_B}, whole, build_histories(whole), "test", scorer.tables, replicates=20)
    long_B = np.array([len(build_histories(whole).history("test", row)) > 1 for row in range(len(warm_B))])
    new_B = ~test["item_id"].is_in(seen_items).to_numpy()
    assert 5 < new_B.sum() < (~warm_B).sum()
    groups = {"all": np.full_like(warm_B, True), "warm": warm_B, "cold": ~warm_B}
    groups |= {"new items": new_B, "history": long_B}
    assert list(report) == [*groups, "scorers", "score minus"]
    for name, chosen in groups.items():
        assert report[name]["rows"] == chosen.sum()
        assert report[name]["auc"]["value"] == pytest.approx(roc_auc_score(labels_B[chosen], scores_B[chosen]))
        assert report[name]["log_loss"]["value"] == pytest.approx(
            log_loss(labels_B[chosen], scores_B[chosen]), abs=1e-5
        )


def test_a_split_without_cold_rows_says_so(scorer: Scorer, dataset: Dataset, histories: Histories) -> None:
    scores_B = np.full(dataset.splits["train"].height, 0.4, np.float32)
    report = judge({"score": scores_B}, dataset, histories, "train", scorer.tables, replicates=5)
    nothing = {"value": None, "low": None, "high": None}
    assert report["cold"] == {"rows": 0, "auc": nothing, "uauc": nothing, "log_loss": nothing, "ece": nothing}
    assert report["warm"] == report["all"] and report["all"]["auc"]["value"] == 0.5


def test_what_is_known_of_a_row_is_what_the_service_assembles(
    scorer: Scorer, dataset: Dataset, histories: Histories, raw_valid: np.ndarray
) -> None:
    """Vectors, flags and the language model's logit, row by row, against a prompt assembled for the row alone."""
    outcomes = row_outcomes(dataset, "valid", LIVE, scorer.tables)
    scored = score_split(scorer, dataset, histories, "valid", 2048, outcomes=outcomes)
    counts = row_counts(dataset, "valid", LIVE)
    known = scored.known(counts, live=True)
    valid = dataset.splits["valid"]
    for row in range(0, valid.height, 9):
        item = scorer.tables.item(valid["item_id"][row])
        liked = [dataset.items["item_id"][int(one)] for one in histories.history("valid", row)]
        user = scorer.user(scorer.tables.user(valid["user_id"][row]), liked, len(liked))
        assert item is not None
        evidence = scorer.tables.evidence(valid["user_id"][row], outcomes.of(row))
        user = scorer.assembler.updated(user, evidence, float(valid["timestamp"][row]))
        group = scorer.assembler.group(user, [item])
        user_counts = Counts(int(counts.user_impressions_B[row]), int(counts.user_positives_B[row]))
        item_counts = Counts(int(counts.item_impressions_B[row]), int(counts.item_positives_B[row]))
        alone = known_pairs(
            logit(raw_valid[row : row + 1]), group, (user_counts, user), [(item_counts, not item.trained)], live=True
        )
        at = float(valid["timestamp"][row])
        newest = histories.times_of(int(histories.of_split("valid").user_code[row]))[: len(liked)]
        newest = newest[max(0, len(liked) - scorer.assembler.template.config.max_history) :]
        ages_L = known.like_ages_KL[row]
        np.testing.assert_array_equal(ages_L[np.isfinite(ages_L)], (at - newest).astype(np.float32))
        assert np.isnan(alone.like_ages_KL).all()  # a stored user has no moment
        told = vars(known.rows(slice(row, row + 1))) | {"like_ages_KL": alone.like_ages_KL}
        for name, value in told.items():
            np.testing.assert_allclose(value, vars(alone)[name], atol=1e-6, err_msg=name)
    moved_B = np.abs(known.live_user_KC - known.user_KC).max(axis=1) > 1e-3
    assert moved_B[known.cold_user_K].any() and moved_B[~known.cold_user_K].any()


def test_live_counts_without_the_outcomes_of_the_rows_are_refused(
    scorer: Scorer, dataset: Dataset, histories: Histories
) -> None:
    scored = score_split(scorer, dataset, histories, "valid", 2048)
    with pytest.raises(ValueError, match="give score_split the outcomes"):
        scored.known(row_counts(dataset, "valid", LIVE), live=True)
