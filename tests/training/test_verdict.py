from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from models.loading import Bundle
from tests.training.micro import Trained
from training.counts import LIVE, STATIC, Counting, row_counts, row_outcomes
from training.data.dataset import Dataset, load_dataset
from training.data.errors import DataError
from training.data.history import Histories, build_histories
from training.evaluate import ScoredSplit, Scorer, score_split
from training.fusion import cross_fitted, fit_fusion, fit_rates
from training.report import verdict_sentences
from training.verdict import WITH_LIVE_COUNTS, fit_and_judge, judge_bundle


@pytest.fixture(scope="module")
def whole(trained: Trained) -> Dataset:
    return load_dataset(trained.data)


@pytest.fixture(scope="module")
def scored_test(scorer: Scorer, whole: Dataset) -> ScoredSplit:
    outcomes = row_outcomes(whole, "test", LIVE, scorer.tables)
    return score_split(scorer, whole, build_histories(whole), "test", 2048, outcomes=outcomes)


@pytest.fixture(scope="module")
def scored_valid(scorer: Scorer, dataset: Dataset, histories: Histories) -> ScoredSplit:
    outcomes = row_outcomes(dataset, "valid", LIVE, scorer.tables)
    return score_split(scorer, dataset, histories, "valid", 2048, outcomes=outcomes)


def judged(bundle: Bundle, scorer: Scorer, scored: ScoredSplit, data: Dataset, counting: Counting) -> dict[str, Any]:
    return judge_bundle(bundle.fusion(), scored, data, build_histories(data), "test", scorer.tables, counting)


def test_every_scorer_is_judged_and_score_is_compared_with_each(
    bundle: Bundle, scorer: Scorer, whole: Dataset, scored_test: ScoredSplit
) -> None:
    report = judged(bundle, scorer, scored_test, whole, STATIC)
    assert list(report["scorers"]) == list(report["score minus"]) == ["raw", "collab", "rates", "boosting"]
    labels_B = whole.splits["test"]["label"]
    assert report["scorers"]["raw"]["auc"]["value"] == pytest.approx(roc_auc_score(labels_B, scored_test.raw_B))
    for name, measured in report["scorers"].items():
        gap = report["score minus"][name]["auc"]
        assert gap["value"] == pytest.approx(report["all"]["auc"]["value"] - measured["auc"]["value"])
        assert gap["low"] <= gap["value"] <= gap["high"]
        assert set(measured) == {"auc", "uauc", "log_loss", "ece"}
    assert report["live"] is False and "chosen on valid" not in report and "left out" not in report
    lengths_B = build_histories(whole).of_split("test").length
    assert report["history"]["rows"] == int((lengths_B >= 2).sum()) < report["all"]["rows"]


def test_live_counts_change_the_score_and_what_is_counted_and_nothing_else(
    bundle: Bundle, scorer: Scorer, whole: Dataset, scored_test: ScoredSplit
) -> None:
    static, live = (judged(bundle, scorer, scored_test, whole, counting) for counting in (STATIC, LIVE))
    assert live["live"] is True
    for name in ("rates", "boosting"):
        assert live["scorers"][name] != static["scorers"][name]
    assert live["all"] != static["all"]
    labels_B = whole.splits["test"]["label"]
    for counting, report in ((STATIC, static), (LIVE, live)):
        known = scored_test.known(row_counts(whole, "test", counting), live=counting.live)
        assert report["all"]["auc"]["value"] == pytest.approx(roc_auc_score(labels_B, bundle.fusion()(known)))
    for name in ("raw", "collab"):
        assert live["scorers"][name] == static["scorers"][name]
    waiting = judged(bundle, scorer, scored_test, whole, Counting(live=True, delay=10.0**9))
    train_alone = Dataset(whole.items, {name: whole.splits[name] for name in ("train", "test")})
    assert waiting["scorers"]["rates"]["auc"]["value"] == 0.5  # nothing is known so early
    again = judged(bundle, scorer, scored_test, train_alone, STATIC)
    assert again["all"]["log_loss"]["value"] == pytest.approx(static["all"]["log_loss"]["value"])


def test_without_train_the_bundles_counts_stand_in_and_boosting_is_left_out(
    bundle: Bundle, scorer: Scorer, whole: Dataset, scored_test: ScoredSplit
) -> None:
    """The bundle has counted train and valid, and holds the outcomes of valid."""
    alone = Dataset(whole.items, {"test": whole.splits["test"]})
    report = judged(bundle, scorer, scored_test, alone, STATIC)
    assert list(report["scorers"]) == ["raw", "collab", "rates"]
    assert report["left out"] == {"boosting": "the data folder has no train split"}
    counts = row_counts(alone, "test", LIVE, scorer.tables)
    expected = row_counts(whole, "test", LIVE)
    for name, values in vars(expected).items():
        np.testing.assert_array_equal(vars(counts)[name], values)
    both = Dataset(whole.items, {name: whole.splits[name] for name in ("valid", "test")})
    for name, values in vars(row_counts(both, "test", LIVE, scorer.tables)).items():
        np.testing.assert_array_equal(values, vars(expected)[name])
    known = row_outcomes(whole, "test", LIVE, scorer.tables)
    for data in (alone, both):
        found = row_outcomes(data, "test", LIVE, scorer.tables)
        assert all(found.of(row) == known.of(row) for row in range(whole.splits["test"].height))
    assert sum(map(len, scorer.tables.outcomes)) == whole.splits["valid"].height
    with pytest.raises(DataError, match="the bundle's counts hold its labels; add train"):
        row_counts(Dataset(whole.items, {"valid": whole.splits["valid"]}), "valid", STATIC, scorer.tables)


def test_fit_judges_valid_by_fusions_of_other_users_and_says_what_valid_chose(
    trained: Trained, scorer: Scorer, dataset: Dataset, histories: Histories, scored_valid: ScoredSplit
) -> None:
    fusion, report, live_B = fit_and_judge(scored_valid, dataset, histories, scorer.tables, 0)
    labels_B, users_B = dataset.splits["valid"]["label"].to_numpy(), histories.of_split("valid").user_code
    rates = fit_rates(dataset.splits["train"])
    known = [
        scored_valid.known(row_counts(dataset, "valid", counting), live=counting.live) for counting in (STATIC, LIVE)
    ]
    assert fusion == fit_fusion(known[0], known[1], labels_B, users_B, rates)
    live = report[WITH_LIVE_COUNTS]
    crossed = [cross_fitted(one, labels_B, users_B, rates) for one in known]
    np.testing.assert_array_equal(live_B, crossed[1])
    for part, scores_B in zip((report, live), crossed, strict=True):
        assert part["all"]["auc"]["value"] == pytest.approx(roc_auc_score(labels_B, scores_B))
        assert part["chosen on valid"] == ["checkpoints"]
        assert list(part["scorers"]) == ["raw", "collab", "rates", "boosting"]
    assert (report["live"], live["live"]) == (False, True)


def test_evaluate_on_valid_says_that_valid_fitted_the_fusion(
    bundle: Bundle, scorer: Scorer, dataset: Dataset, histories: Histories, scored_valid: ScoredSplit
) -> None:
    report = judge_bundle(bundle.fusion(), scored_valid, dataset, histories, "valid", scorer.tables, STATIC)
    assert report["chosen on valid"] == ["checkpoints", "fusion"]


def gap(value: float | None, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


def test_a_loss_is_one_plain_sentence_and_noise_is_none() -> None:
    report = {
        "live": True,
        "score minus": {
            "raw": {"auc": gap(0.01, 0.005, 0.02), "uauc": gap(None)},
            "rates": {"auc": gap(-0.01, -0.03, 0.001), "uauc": gap(-0.004, -0.006, -0.002)},
            "boosting": {"auc": gap(-0.012, -0.02, -0.004), "uauc": gap(0.0, -0.1, 0.1)},
        },
    }
    assert verdict_sentences(report, "valid") == [
        "score loses to rates on valid with live counts by 0.004 UAUC (0.002 to 0.006).",
        "score loses to boosting on valid with live counts by 0.012 AUC (0.004 to 0.020).",
    ]
    won = {"live": False, "score minus": {"raw": report["score minus"]["raw"], "collab": {"auc": gap(0, 0, 0)}}}
    assert verdict_sentences(won, "test") == ["score loses to none of raw, collab on test."]


def test_a_delay_holds_back_likes_from_histories(whole: Dataset) -> None:
    histories = build_histories(whole)
    times_B = whole.splits["test"]["timestamp"].to_numpy().astype(float)
    delay = 20 * 86_400.0
    delayed = histories.delayed("test", times_B - delay)
    everything = pl.concat([frame.select("user_id", "label", "timestamp") for frame in whole.splits.values()])
    for row, one in enumerate(whole.splits["test"].iter_rows(named=True)):
        known = everything.filter(
            (pl.col("user_id") == one["user_id"])
            & (pl.col("label") == 1)
            & (pl.col("timestamp") < times_B[row] - delay)
        )
        assert len(delayed.history("test", row)) == known.height
    assert (delayed.of_split("test").length < histories.of_split("test").length).any()
    assert (delayed.of_split("train").length == histories.of_split("train").length).all()
