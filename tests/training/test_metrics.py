import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from training.metrics import auc, evaluate_scores, log_loss_difference, mean_interval, paired_difference, uauc

# Ten steps: most draws hold ties, within a class and across the two.
rows = st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.integers(0, 4)), min_size=1, max_size=60)


def arrays(drawn: list[tuple[int, bool, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores, labels, users = zip(*drawn, strict=True)
    return np.array(scores) / 10, np.array(labels, np.float32), np.array(users, np.int32)


def many_users(users: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of users with levels of their own, so that a user's rows are far from independent."""
    rng = np.random.default_rng(seed)
    users_B = np.repeat(np.arange(users), 10)
    logits_B = rng.normal(0, 1, users)[users_B] + rng.normal(0, 1, len(users_B))
    labels_B = (rng.random(len(users_B)) < 1 / (1 + np.exp(-logits_B))).astype(np.float32)
    return 1 / (1 + np.exp(-logits_B)), labels_B, users_B.astype(np.int32)


@settings(max_examples=200, deadline=None)
@given(rows)
def test_auc_is_sklearns_with_ties_and_none_for_one_class(drawn: list[tuple[int, bool, int]]) -> None:
    scores_B, labels_B, _ = arrays(drawn)
    if len(np.unique(labels_B)) < 2:
        assert auc(scores_B, labels_B) is None
    else:
        assert auc(scores_B, labels_B) == pytest.approx(roc_auc_score(labels_B, scores_B), abs=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["one", "all"])
def test_no_figure_is_told_of_scores_that_are_not_finite(bad: float, where: str) -> None:
    """NaN has no place in an order: AUC was 1.0 or 0.0 by the order of the rows."""
    scores_B, labels_B, users_B = many_users(6)
    spoilt_B = np.full_like(scores_B, bad) if where == "all" else np.where(np.arange(len(scores_B)) == 7, bad, scores_B)
    for order in (np.argsort(labels_B), np.argsort(-labels_B)):
        spoilt, labels, users = spoilt_B[order], labels_B[order], users_B[order]
        assert auc(spoilt, labels) is None and uauc(spoilt, labels, users) is None
        measured = evaluate_scores(spoilt, labels, users, replicates=20)
        assert all(one.value is one.low is one.high is None for one in measured.values())
        differences = paired_difference(scores_B[order], spoilt, labels, users, replicates=20)
        assert all(one.value is None for one in differences.values())
        assert log_loss_difference(spoilt, scores_B[order], labels, users, replicates=20).value is None


def test_the_bootstrap_of_many_users_never_holds_all_replicates_at_once() -> None:
    users, replicates = 20_000, 400
    scores_B, labels_B = np.random.default_rng(0).random(users), (np.arange(users) % 3 == 0).astype(np.float32)
    tracemalloc.start()
    try:
        evaluate_scores(scores_B, labels_B, np.arange(users), replicates=replicates)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < replicates * users * 8 / 4


def test_auc_of_nothing_is_none() -> None:
    assert auc(np.zeros(0), np.zeros(0)) is None


@settings(max_examples=100, deadline=None)
@given(rows)
def test_uauc_is_the_plain_mean_over_the_users_with_both_classes(drawn: list[tuple[int, bool, int]]) -> None:
    scores_B, labels_B, users_B = arrays(drawn)
    areas = [
        roc_auc_score(labels_B[users_B == user], scores_B[users_B == user])
        for user in np.unique(users_B)
        if len(np.unique(labels_B[users_B == user])) == 2
    ]
    found = uauc(scores_B, labels_B, users_B)
    assert found is None if not areas else found == pytest.approx(np.mean(areas), abs=1e-12)


def test_uauc_counts_a_user_once_however_many_rows_they_have() -> None:
    scores_B = np.array([0.1, 0.9, *np.linspace(0.9, 0.1, 20)])
    labels_B = np.array([0, 1, *[0] * 10, *[1] * 10])
    users_B = np.array([0, 0, *[1] * 20])
    assert uauc(scores_B, labels_B, users_B) == pytest.approx((1.0 + 0.0) / 2)


def test_log_loss_and_calibration_error_are_those_computed_by_hand() -> None:
    # Bins are fifteenths: 0.02 and 0.05 share the first one, 0.5 stands alone in the eighth, 0.99 in the last.
    scores_B, labels_B = np.array([0.02, 0.05, 0.5, 0.99]), np.array([0.0, 1.0, 1.0, 1.0])
    measured = evaluate_scores(scores_B, labels_B, np.arange(4))
    by_hand = -(math.log(0.98) + math.log(0.05) + math.log(0.5) + math.log(0.99)) / 4
    assert measured["log_loss"].value == pytest.approx(by_hand)
    assert measured["log_loss"].value == pytest.approx(log_loss(labels_B, scores_B))
    assert measured["ece"].value == pytest.approx((abs(1 - 0.07) + abs(1 - 0.5) + abs(1 - 0.99)) / 4)


def test_a_certain_and_wrong_score_has_a_large_but_finite_loss() -> None:
    measured = evaluate_scores(np.array([0.0, 1.0]), np.array([1.0, 0.0]), np.arange(2))
    assert measured["log_loss"].value == pytest.approx(-math.log(1e-7), rel=1e-3)


def test_perfectly_calibrated_scores_have_hardly_any_calibration_error() -> None:
    rng = np.random.default_rng(0)
    scores_B = rng.random(50_000)
    labels_B = (rng.random(50_000) < scores_B).astype(float)
    value = evaluate_scores(scores_B, labels_B, np.arange(50_000), replicates=2)["ece"].value
    assert value is not None and value < 0.01


def test_intervals_contain_the_value_and_narrow_with_more_users() -> None:
    few, many = evaluate_scores(*many_users(25)), evaluate_scores(*many_users(400))
    for metric in ("auc", "uauc", "log_loss", "ece"):
        for found in (few[metric], many[metric]):
            assert found.low is not None and found.value is not None and found.high is not None
            assert found.low <= found.value <= found.high
        assert few[metric].high - few[metric].low > 1.8 * (many[metric].high - many[metric].low), metric


def test_the_95_percent_interval_covers_the_truth_about_that_often() -> None:
    """The rows of a user share a level: resampling rows instead of users would cover far less."""
    truth = auc(*many_users(20_000, seed=999)[:2])
    assert truth is not None
    covered = 0
    for seed in range(100):
        found = evaluate_scores(*many_users(40, seed=seed), replicates=200)["auc"]
        assert found.low is not None and found.high is not None
        covered += found.low <= truth <= found.high
    assert covered >= 86


def test_users_are_resampled_not_rows() -> None:
    """Ten copies of every row tell nothing new, and must not narrow an interval."""
    scores_B, labels_B, users_B = many_users(60)
    once = evaluate_scores(scores_B, labels_B, users_B)
    copied = evaluate_scores(np.repeat(scores_B, 10), np.repeat(labels_B, 10), np.repeat(users_B, 10))
    for metric, found in once.items():
        assert copied[metric].as_dict() == pytest.approx(found.as_dict(), abs=1e-9), metric


def test_the_order_of_rows_and_the_codes_of_users_do_not_matter() -> None:
    scores_B, labels_B, users_B = many_users(30)
    order = np.random.default_rng(1).permutation(len(scores_B))
    shuffled = evaluate_scores(scores_B[order], labels_B[order], users_B[order] * 7 + 3)
    for metric, found in evaluate_scores(scores_B, labels_B, users_B).items():
        assert shuffled[metric].as_dict() == pytest.approx(found.as_dict(), abs=1e-9), metric


def test_identical_scores_differ_by_exactly_nothing() -> None:
    scores_B, labels_B, users_B = many_users(30)
    for found in paired_difference(scores_B, scores_B.copy(), labels_B, users_B).values():
        assert found.as_dict() == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_paired_difference_is_surer_than_the_two_intervals_apart() -> None:
    scores_B, labels_B, users_B = many_users(100)
    worse_B = scores_B + np.random.default_rng(3).normal(0, 0.1, len(scores_B))
    found = paired_difference(scores_B, worse_B, labels_B, users_B)["auc"]
    alone = evaluate_scores(scores_B, labels_B, users_B)["auc"]
    value, theirs = auc(scores_B, labels_B), auc(worse_B, labels_B)
    assert value is not None and theirs is not None and found.low is not None and found.high is not None
    assert found.value == pytest.approx(value - theirs)
    assert alone.low is not None and alone.high is not None
    assert found.high - found.low < (alone.high - alone.low) / 2
    assert found.low > 0  # the noise is real, and the pairing shows it


def test_one_user_has_a_value_and_an_interval_of_no_width() -> None:
    scores_B, labels_B = np.array([0.1, 0.4, 0.3, 0.9]), np.array([0, 0, 1, 1])
    for found in evaluate_scores(scores_B, labels_B, np.zeros(4, int)).values():
        assert found.value is not None
        assert (found.low, found.high) == pytest.approx((found.value, found.value), abs=1e-12)


def test_one_class_leaves_auc_and_uauc_undefined_and_the_rest_defined() -> None:
    measured = evaluate_scores(np.array([0.2, 0.7]), np.ones(2), np.arange(2))
    assert measured["auc"].as_dict() == measured["uauc"].as_dict() == {"value": None, "low": None, "high": None}
    assert measured["log_loss"].value is not None and measured["ece"].value is not None


def test_users_of_one_class_each_leave_uauc_alone_undefined() -> None:
    measured = evaluate_scores(np.array([0.2, 0.7]), np.array([0.0, 1.0]), np.arange(2))
    assert measured["auc"].value == 1.0 and measured["uauc"].value is None


def test_mean_interval_is_students() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    # t of 2 degrees of freedom at 97.5 % is 4.3027; the standard error is 1 / sqrt(3).
    assert found.as_dict() == pytest.approx({"value": 2.0, "low": 2 - 2.4841, "high": 2 + 2.4841}, abs=1e-3)
