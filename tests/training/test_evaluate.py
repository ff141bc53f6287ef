from collections.abc import Callable
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from models.backbone import Backbone
from models.loading import Calibration
from tests.training.micro import Trained
from training.data.dataset import Dataset, load_dataset
from training.data.history import Histories, build_histories
from training.evaluate import Scorer, cold_rows, fit_calibration, judge, score_split
from training.examples import Examples
from training.pipeline import Prepared, _scorer
from training.run import Run
from training.stages.align import Collab
from training.stages.project import SlotForward, SlotTables, folded_users, initial_projections


@pytest.fixture(scope="module")
def raw_valid(scorer: Scorer, dataset: Dataset, histories: Histories) -> np.ndarray:
    return score_split(scorer, dataset, histories, "valid", 2048)


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
    return SlotForward(run, merged, initial_projections(run, merged, collab), tables, folded)


@pytest.fixture(scope="module")
def served(stage_3: SlotForward, trained: Trained, examples: Examples, histories: Histories, collab: Collab) -> Scorer:
    """The same as the bundle would hold it."""
    prepared = Prepared("", trained.folder / "adapter", "", stage_3.backbone, examples, collab.semantic_ID)
    return _scorer(stage_3.run, prepared, histories, collab, stage_3.tables.final(), stage_3.projections)


def test_the_served_score_is_what_stage_3_trained_cold_rows_included(
    stage_3: SlotForward, served: Scorer, examples: Examples, dataset: Dataset, histories: Histories
) -> None:
    """Tables and prompts by the service's code, against the training forward on the same rows."""
    logits_B = logit(score_split(served, dataset, histories, "valid", 2048))
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
    np.testing.assert_array_equal(without, raw_valid)


def test_a_score_does_not_depend_on_what_came_later(scorer: Scorer, dataset: Dataset, raw_valid: np.ndarray) -> None:
    early = dataset.splits["valid"].head(90)
    cut = Dataset(dataset.items, {"train": dataset.splits["train"], "valid": early})
    np.testing.assert_allclose(score_split(scorer, cut, build_histories(cut), "valid", 2048), raw_valid[:90], atol=1e-6)


def test_a_score_does_not_depend_on_its_own_label(scorer: Scorer, dataset: Dataset, raw_valid: np.ndarray) -> None:
    valid = dataset.splits["valid"]
    last = valid.with_row_index("row").group_by("user_id").agg(pl.col("row").last())["row"].to_numpy()
    flipped = valid["label"].to_numpy().copy()
    flipped[last] = 1 - flipped[last]
    turned = Dataset(
        dataset.items, {**dataset.splits, "valid": valid.with_columns(label=pl.Series(flipped, dtype=pl.Int8))}
    )
    again = score_split(scorer, turned, build_histories(turned), "valid", 2048)
    np.testing.assert_allclose(again[last], raw_valid[last], atol=1e-6)


def test_the_forwards_size_does_not_change_a_score(
    scorer: Scorer, dataset: Dataset, histories: Histories, raw_valid: np.ndarray
) -> None:
    np.testing.assert_allclose(score_split(scorer, dataset, histories, "valid", 150), raw_valid, atol=1e-5)


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
    scores = score_split(scorer, strange, build_histories(strange), "test", 2048)
    assert np.isfinite(scores).all() and len(set(scores.tolist())) == 3
    cold_user_B, cold_item_B = cold_rows(strange, "test", scorer.tables)
    assert cold_user_B.all() and cold_item_B[-1]


def test_warm_means_user_and_item_both_in_train(trained: Trained, scorer: Scorer, histories: Histories) -> None:
    whole = load_dataset(trained.data)
    train, test = whole.splits["train"], whole.splits["test"]
    seen_users, seen_items = set(train["user_id"]), set(train["item_id"])
    warm_B = np.array(
        [user in seen_users and item in seen_items for user, item in test.select("user_id", "item_id").iter_rows()]
    )
    assert 20 < warm_B.sum() < len(warm_B) - 20
    scores_B, labels_B = np.random.default_rng(0).random(len(warm_B)).astype(np.float32), test["label"].to_numpy()
    new_B = ~test["item_id"].is_in(seen_items).to_numpy()
    assert 5 < new_B.sum() < (~warm_B).sum()
    parts = {"all": np.full_like(warm_B, True), "warm": warm_B, "cold": ~warm_B, "new items": new_B}
    report = judge(scores_B, whole, build_histories(whole), "test", scorer.tables, replicates=20)
    assert {name: part["rows"] for name, part in report.items()} == {
        name: int(row_B.sum()) for name, row_B in parts.items()
    }
    for name, chosen in parts.items():
        assert report[name]["auc"]["value"] == pytest.approx(roc_auc_score(labels_B[chosen], scores_B[chosen]))
        assert report[name]["log_loss"]["value"] == pytest.approx(
            log_loss(labels_B[chosen], scores_B[chosen]), abs=1e-5
        )


def test_a_split_without_cold_rows_says_so(scorer: Scorer, dataset: Dataset, histories: Histories) -> None:
    scores_B = np.full(dataset.splits["train"].height, 0.4, np.float32)
    report = judge(scores_B, dataset, histories, "train", scorer.tables, replicates=5)
    nothing = {"value": None, "low": None, "high": None}
    assert report["cold"] == {"rows": 0, "auc": nothing, "uauc": nothing, "log_loss": nothing, "ece": nothing}
    assert report["warm"] == report["all"] and report["all"]["auc"]["value"] == 0.5


def test_the_report_of_fit_is_the_judgement_of_the_bundle_on_valid(
    trained: Trained, bundle: object, scorer: Scorer, dataset: Dataset, histories: Histories, raw_valid: np.ndarray
) -> None:
    calibration = Calibration.model_validate_json((trained.bundle / "calibration.json").read_text())
    judged = judge(calibration(raw_valid), dataset, histories, "valid", scorer.tables)
    for part in ("all", "warm", "cold"):
        for metric in ("auc", "uauc", "log_loss", "ece"):
            assert trained.report[part][metric] == pytest.approx(judged[part][metric], abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(-2, 2))
def test_calibration_never_changes_a_ranking(seed: int, steepness: float, shift: float) -> None:
    """Whatever the labels, those that go against the scores and those of one class included."""
    rng = np.random.default_rng(seed)
    raw_B = rng.random(300).astype(np.float32)
    labels_B = (rng.random(300) < 1 / (1 + np.exp(-(steepness * logit(raw_B) + shift)))).astype(np.float32)
    calibration = fit_calibration(raw_B, labels_B)
    calibrated = calibration(np.linspace(0.01, 0.99, 99, dtype=np.float32))
    assert (np.diff(calibrated) >= 0).all()
    assert calibration.slope > 0
    if 0.1 < calibration.slope < 2:
        assert (np.diff(calibrated) > 0).all()


def test_calibration_recovers_a_known_distortion() -> None:
    rng = np.random.default_rng(0)
    true_B = rng.normal(0, 1.5, 40_000)
    labels_B = (rng.random(40_000) < 1 / (1 + np.exp(-true_B))).astype(np.float32)
    raw_B = (1 / (1 + np.exp(-(2 * true_B - 1)))).astype(np.float32)
    calibration = fit_calibration(raw_B, labels_B)
    assert calibration.slope == pytest.approx(0.5, abs=0.02)
    assert calibration.intercept == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], [1, 1, 0]])
def test_calibration_is_left_alone_where_it_could_not_increase(labels: list[int]) -> None:
    raw_B = np.array([0.2, 0.3, 0.9], np.float32)
    assert fit_calibration(raw_B, np.array(labels, np.float32)) == Calibration()
