from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from models.fusion import INPUTS, SIGNED, Fusion, Known, Rates, Weight, Weights
from training.counts import LIVE, STATIC, Counting, RowCounts, row_counts
from training.data.dataset import Dataset
from training.fusion import cross_fitted, fit_fusion, fit_rates, fit_weights, scores_of
from training.metrics import uauc

USERS, ITEMS, WIDTH = 300, 120, 6


@dataclass(frozen=True)
class World:
    """Rows in time order, the vectors of their users and items, and a language model's logit of each valid row."""

    dataset: Dataset
    lm_B: np.ndarray
    user_BC: np.ndarray
    item_BC: np.ndarray
    user_B: np.ndarray
    labels_B: np.ndarray

    def known(self, counts: RowCounts, *, live: bool = True) -> Known:
        cold = np.zeros(len(self.lm_B), bool)
        return Known(
            self.lm_B, self.user_BC, self.user_BC, self.item_BC, 0 * self.item_BC, counts.user_impressions_B,
            counts.user_positives_B, counts.item_impressions_B, counts.item_positives_B, cold, cold,
            np.zeros((len(cold), 0), np.float32), live,
        )  # fmt: skip

    def counted(self, counting: Counting) -> Known:
        return self.known(row_counts(self.dataset, "valid", counting), live=counting.live)

    def rates(self) -> Rates:
        return fit_rates(self.dataset.splits["train"])

    def weights(self, counting: Counting) -> Weights:
        return fit_weights(self.counted(counting), self.labels_B, self.user_B, self.rates())

    def fusion(self) -> Fusion:
        return fit_fusion(self.counted(STATIC), self.counted(LIVE), self.labels_B, self.user_B, self.rates())


def interval(weight: Weight) -> tuple[float, float, float]:
    return weight.value, weight.low, weight.high


def world(label_of: Callable[..., np.ndarray], *, rows: int = 4000, valid: int = 2000, seed: int = 0) -> World:
    """Draw rows; `label_of` gives the logits of their labels from users, items, vectors and lm."""
    rng = np.random.default_rng(seed)
    user_N, item_N = rng.integers(0, USERS, rows), rng.integers(0, ITEMS, rows)
    user_UC, item_IC = rng.normal(0, 0.5, (USERS, WIDTH)), rng.normal(0, 0.5, (ITEMS, WIDTH))
    user_UC[:, -1], item_IC[:, -2] = 1, 1
    lm_N = rng.normal(0, 1, rows)
    logit_N = label_of(rng, user_N, item_N, user_UC, item_IC, lm_N)
    frame = pl.DataFrame(
        {
            "user_id": [f"u{one}" for one in user_N],
            "item_id": [f"m{one}" for one in item_N],
            "label": pl.Series((rng.random(rows) < 1 / (1 + np.exp(-logit_N))).astype(np.int8)),
            "timestamp": np.sort(rng.integers(0, 3 * rows, rows)),
            "weight": pl.Series(np.ones(rows), dtype=pl.Float32),
        }
    )
    part = slice(rows - valid, rows)
    return World(
        Dataset(pl.DataFrame(), {"train": frame[: rows - valid], "valid": frame[part]}),
        lm_N[part],
        user_UC[user_N[part]].astype(np.float32),
        item_IC[item_N[part]].astype(np.float32),
        user_N[part],
        frame["label"].to_numpy()[part],
    )


def at_random(rng: np.random.Generator, user_N: np.ndarray, *rest: object) -> np.ndarray:
    return np.zeros(len(user_N))


def planted(
    rng: np.random.Generator,
    user_N: np.ndarray,
    item_N: np.ndarray,
    user_UC: np.ndarray,
    item_IC: np.ndarray,
    lm_N: np.ndarray,
) -> np.ndarray:
    """The language model's logit with a weight of 0.7, the collaborative prediction with 2."""
    return 0.7 * lm_N + 2.0 * (user_UC[user_N] * item_IC[item_N]).sum(-1)


def leaning(
    rng: np.random.Generator, user_N: np.ndarray, item_N: np.ndarray, user_UC: np.ndarray, *rest: object
) -> np.ndarray:
    """Users differ much in their leniency, which only their counts show; items differ by their bias."""
    item_IC = rest[0]
    return rng.normal(0, 1.5, USERS)[user_N] + 2 * np.asarray(item_IC)[item_N, -1]


def test_the_live_fit_orders_the_items_of_one_user_and_stays_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = world(leaning, rows=9000, valid=6000)
    known, labels_B = drawn.counted(LIVE), drawn.labels_B
    of_user = {}
    for weight in (0.0, 1.0, 20.0):
        monkeypatch.setattr("training.fusion.PAIR_WEIGHT", weight)
        fitted = drawn.weights(LIVE)
        scores_B = scores_of(Fusion(rates=drawn.rates(), live=fitted), known)
        of_user[weight] = uauc(scores_B, labels_B, drawn.user_B)
        assert scores_B.mean() == pytest.approx(labels_B.mean(), abs=1e-3)
        high_B = scores_B > np.quantile(scores_B, 0.8)
        assert labels_B[high_B].mean() == pytest.approx(scores_B[high_B].mean(), abs=0.03)
        assert all(one.low <= one.value <= one.high for one in fitted.weights.values())
    assert of_user[0.0] + 0.002 < of_user[1.0] < of_user[20.0]
    monkeypatch.setattr("training.fusion.PAIR_WEIGHT", 1.0)
    few = drawn.weights(LIVE)
    monkeypatch.setattr("training.fusion.MAX_PAIRS", 6000)  # pairs drawn at random: about the same weights
    for name, one in drawn.weights(LIVE).weights.items():
        assert one.value == pytest.approx(few.weights[name].value, abs=0.25), name


@pytest.mark.parametrize("seed", range(3))
def test_without_anything_to_learn_no_label_leaks_into_a_cross_fitted_score(seed: int) -> None:
    """An AUC of 2,000 random labels has a standard error of 0.013."""
    drawn = world(at_random, seed=seed)
    for counting in (STATIC, LIVE):
        scores_B = cross_fitted(drawn.counted(counting), drawn.labels_B, drawn.user_B, drawn.rates())
        assert roc_auc_score(drawn.labels_B, scores_B) == pytest.approx(0.5, abs=0.045)


@pytest.mark.parametrize(
    ("delay", "leak"), [(-1.0, "the row's own label"), (-(10.0**9), "the labels of later rows as well")]
)
def test_the_test_above_can_see_a_leak(delay: float, leak: str) -> None:
    drawn = world(at_random)
    leaking = drawn.counted(Counting(live=True, delay=delay))
    scores_B = cross_fitted(leaking, drawn.labels_B, drawn.user_B, drawn.rates())
    assert roc_auc_score(drawn.labels_B, scores_B) > 0.6, leak


def test_labels_of_a_fold_do_not_reach_its_own_scores() -> None:
    """With static counts, turning one user's labels round orders none of the user's rows anew, but others' rows.

    The two numbers that all folds share, the logits' mean and spread, do move: by one map for all rows of the fold.
    """
    drawn = world(planted)
    rates, static = drawn.rates(), drawn.counted(STATIC)
    mine_B = drawn.user_B == drawn.user_B[0]
    turned_B = np.where(mine_B, 1 - drawn.labels_B, drawn.labels_B)
    before_B = cross_fitted(static, drawn.labels_B, drawn.user_B, rates)
    after_B = cross_fitted(static, turned_B, drawn.user_B, rates)
    before_B, after_B = (np.log(one) - np.log1p(-one) for one in (before_B, after_B))
    assert np.ptp(before_B[mine_B]) > 0.5
    slope, shift = np.polyfit(before_B[mine_B], after_B[mine_B], 1)
    np.testing.assert_allclose(slope * before_B[mine_B] + shift, after_B[mine_B], atol=1e-5)
    assert slope == pytest.approx(1, abs=0.05) and abs(shift) < 0.05
    slope, shift = np.polyfit(before_B, after_B, 1)
    assert np.abs(slope * before_B + shift - after_B).max() > 1e-3


def test_a_scorer_loses_nothing_by_cross_fitting_where_users_differ_in_what_they_like() -> None:
    """Users with different base rates: a fold without lenient users has a low intercept, which must not order rows."""

    def lenient(rng: np.random.Generator, user_N: np.ndarray, *rest: np.ndarray) -> np.ndarray:
        return np.asarray(rng.normal(0, 1.5, USERS)[user_N] + rest[-1])

    drawn = world(lenient, rows=4000, valid=3000)
    nobody = RowCounts(*np.zeros((4, 3000), np.int64))  # nothing is known of a user's level
    known = replace(
        drawn.known(nobody),
        user_KC=np.zeros((3000, 3), np.float32),
        live_user_KC=np.zeros((3000, 3), np.float32),
        item_KC=np.zeros((3000, 3), np.float32),
    )
    scores_B = cross_fitted(known, drawn.labels_B, drawn.user_B, Rates())
    assert roc_auc_score(drawn.labels_B, scores_B) == pytest.approx(roc_auc_score(drawn.labels_B, drawn.lm_B), abs=1e-4)


@pytest.mark.parametrize("counting", [STATIC, LIVE])
def test_planted_weights_are_found_and_lie_in_their_intervals(counting: Counting) -> None:
    weights = world(planted, rows=24_000, valid=20_000).weights(counting).weights
    assert weights["lm"].value == pytest.approx(0.7, abs=0.06)
    for name in ("user_bias", "item_bias", "taste"):
        assert weights[name].value == pytest.approx(2.0, abs=0.25), name
    for name, weight in weights.items():
        assert weight.low <= weight.value <= weight.high, name
    lm = weights["lm"]
    assert lm.low < 0.7 < lm.high and 0.02 < lm.high - lm.low < 0.2


def test_intervals_are_those_of_many_fits_on_users_drawn_anew() -> None:
    drawn = world(planted)
    rates, known = drawn.rates(), drawn.counted(LIVE)
    rows_of = [np.flatnonzero(drawn.user_B == user) for user in np.unique(drawn.user_B)]
    rng = np.random.default_rng(1)
    fitted = []
    for _ in range(60):
        rows = np.concatenate([rows_of[one] for one in rng.integers(0, len(rows_of), len(rows_of))])
        again = fit_weights(known.rows(rows), drawn.labels_B[rows], drawn.user_B[rows], rates)
        fitted.append(again.weights["lm"].value)
    low, high = np.percentile(fitted, [2.5, 97.5])
    lm = drawn.weights(LIVE).weights["lm"]
    assert (lm.low, lm.high) == pytest.approx((low, high), abs=0.4 * (high - low))


@pytest.mark.parametrize("counting", [STATIC, LIVE])
def test_no_input_but_the_cold_flags_ever_hurts(counting: Counting) -> None:
    """Labels opposed to every input: the weights stay at zero, and one more positive never lowers a score."""
    drawn = world(lambda *given: -planted(*given))
    weights, fusion, known = drawn.weights(counting).weights, drawn.fusion(), drawn.counted(counting)
    assert tuple(weights) == tuple(INPUTS)
    assert all(weight.low >= 0 for name, weight in weights.items() if name not in SIGNED)
    assert weights["lm"].value == 0
    liked = replace(known, item_impressions_K=known.item_impressions_K + 1, item_positives_K=known.item_positives_K + 1)
    assert (fusion.logits(liked) >= fusion.logits(known) - 1e-12).all()


def test_only_live_counts_give_the_cold_flags_weight() -> None:
    """Cold users like more than others do: the live weights use the flag, the static weights do not."""

    def by_coldness(rng: np.random.Generator, user_N: np.ndarray, *rest: object) -> np.ndarray:
        return np.where(user_N % 2 == 0, 1.0, -1.0)

    drawn = world(by_coldness)
    fitted = {}
    for counting in (STATIC, LIVE):
        known = replace(drawn.counted(counting), cold_user_K=drawn.user_B % 2 == 0)
        fitted[counting] = fit_weights(known, drawn.labels_B, drawn.user_B, drawn.rates()).weights
    assert fitted[LIVE]["cold_user"].value > 0.2
    for name in SIGNED:
        assert interval(fitted[STATIC][name]) == (0, 0, 0)


def test_only_live_rates_are_in_the_model_that_few_rows_stay_near() -> None:
    """100 rows of two users: the penalty on all weights is as much as these rows."""

    def liked(rng: np.random.Generator, user_N: np.ndarray, item_N: np.ndarray, *rest: object) -> np.ndarray:
        return np.asarray(rng.normal(0, 3, ITEMS)[item_N])

    drawn = world(liked)
    users_B = np.arange(100) % 2
    same = drawn.counted(LIVE).rows(slice(100))  # the same counts, called static and live
    static, live = (
        fit_weights(replace(same, live=one), drawn.labels_B[:100], users_B, drawn.rates()).weights["item_rate"].value
        for one in (False, True)
    )
    assert 0 < static < 0.8 * live


def test_each_way_of_counting_is_fitted_by_itself_and_they_cannot_be_mixed_up() -> None:
    drawn = world(planted)
    fusion = drawn.fusion()
    assert (fusion.static, fusion.live) == (drawn.weights(STATIC), drawn.weights(LIVE))
    assert fusion.static != fusion.live
    with pytest.raises(ValueError, match="give static counts, then live ones"):
        fit_fusion(drawn.counted(LIVE), drawn.counted(STATIC), drawn.labels_B, drawn.user_B, drawn.rates())


def test_rates_raise_the_score_of_what_was_liked_more_often() -> None:
    def liked(rng: np.random.Generator, user_N: np.ndarray, item_N: np.ndarray, *rest: object) -> np.ndarray:
        return np.asarray(rng.normal(0, 1.5, ITEMS)[item_N])

    drawn = world(liked)
    known, fusion = drawn.counted(LIVE), drawn.fusion()
    more = replace(known, item_impressions_K=known.item_impressions_K + 1, item_positives_K=known.item_positives_K + 1)
    assert (fusion.logits(more) > fusion.logits(known)).all()


@pytest.mark.parametrize("counting", [STATIC, LIVE])
def test_the_parts_sum_to_the_logit(counting: Counting) -> None:
    drawn = world(planted)
    known, fusion = drawn.counted(counting), drawn.fusion()
    scores_B = fusion(known)
    logit_B = np.sum([*fusion.parts(known).values()], axis=0)
    np.testing.assert_allclose(1 / (1 + np.exp(-logit_B)), scores_B, atol=1e-6)
    assert np.ptp(fusion.parts(known)["lm"]) > 0.5 and np.ptp(fusion.parts(known)["collab"]) > 0.5


def test_scores_in_parts_are_scores_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = world(planted)
    known, fusion = drawn.counted(STATIC), drawn.fusion()
    monkeypatch.setattr("training.fusion.ROWS_AT_ONCE", 300)
    np.testing.assert_array_equal(scores_of(fusion, known), fusion(known))
    assert drawn.fusion() == fusion


@pytest.mark.parametrize("counting", [STATIC, LIVE])
@pytest.mark.parametrize(("rows", "positive"), [(2000, 0), (2000, 2000), (2000, 9), (40, 20)])
def test_too_few_rows_or_one_class_leave_the_mean_of_both_predictions(
    rows: int, positive: int, counting: Counting
) -> None:
    drawn = world(planted)
    known = drawn.counted(counting).rows(slice(rows))
    labels_B = (np.arange(rows) < positive).astype(np.int8)
    fitted = fit_weights(known, labels_B, drawn.user_B[:rows], Rates(base=0.5))
    # At a base rate of 0.5 the log-odds of a prediction p are 4 (p - 0.5) to first order.
    assert interval(fitted.weights["lm"]) == (0.5, 0.5, 0.5)
    assert fitted.weights["taste"].value == 2.0 and fitted.weights["item_rate"].value == 0
    assert fitted.intercept == -1.0
    scores_B = cross_fitted(known, labels_B, drawn.user_B[:rows], Rates(base=0.5))
    fusion = Fusion(rates=Rates(base=0.5), static=fitted, live=fitted)
    np.testing.assert_allclose(scores_B, fusion(known), atol=1e-6)


@pytest.mark.parametrize("counting", [STATIC, LIVE])
def test_a_fit_on_few_rows_stays_near_the_smaller_model(counting: Counting) -> None:
    """60 rows cannot determine thirteen weights; without a penalty some weights would grow without limit."""
    drawn = world(planted)
    known = drawn.counted(counting).rows(slice(60))
    fitted = fit_weights(known, drawn.labels_B[:60], drawn.user_B[:60], drawn.rates())
    for name in ("user_bias", "item_bias", "taste"):
        assert 0.5 < fitted.weights[name].value < 6, name


def test_the_base_rate_is_the_weighted_share_and_strengths_are_those_planted() -> None:
    rng = np.random.default_rng(0)
    items, rows, strength, base = 3000, 20, 12.0, 0.3
    liked_I = rng.beta(strength * base, strength * (1 - base), items)
    item_N = np.repeat(np.arange(items), rows)
    labels_N = (rng.random(len(item_N)) < liked_I[item_N]).astype(np.int8)
    frame = pl.DataFrame(
        {
            "user_id": rng.integers(0, 3000, len(item_N)).astype(str),
            "item_id": item_N.astype(str),
            "label": labels_N,
            "weight": np.where(labels_N > 0, 2.0, 1.0).astype(np.float32),
        }
    )
    rates = fit_rates(frame)
    positive = labels_N.sum()
    assert rates.base == pytest.approx(2 * positive / (len(labels_N) + positive), abs=1e-6)
    unweighted = fit_rates(frame.with_columns(weight=pl.lit(1.0, dtype=pl.Float32)))
    assert unweighted.item_strength == pytest.approx(strength, rel=0.15)
    assert unweighted.user_strength > 150  # users do not differ


@pytest.mark.parametrize("labels", [[1], [0, 0], [1, 0, 1]])
def test_tiny_train_gives_usable_rates(labels: list[int]) -> None:
    ids = [str(one) for one in range(len(labels))]
    weight = pl.Series([1.0] * len(labels), dtype=pl.Float32)
    rates = fit_rates(pl.DataFrame({"user_id": ids, "item_id": ids, "label": labels, "weight": weight}))
    assert 0 < rates.base < 1
    # An impression a user says nothing about how users differ.
    assert (rates.user_strength, rates.item_strength) == pytest.approx((10.0, 5.0), rel=0.01)


def test_fusions_are_equal_for_equal_rows() -> None:
    drawn = world(planted)
    assert drawn.fusion() == drawn.fusion()


@pytest.mark.parametrize("counting", [STATIC, LIVE])
def test_a_recent_like_of_one_user_leaves_the_cross_fitted_scores_of_all_others_calibrated(counting: Counting) -> None:
    """The counts of all other users are at most 6e-9, so their weight is large; this user has 80,000 times as much."""
    drawn = world(planted)
    rng = np.random.default_rng(5)
    ages_B = np.where((rng.random(len(drawn.labels_B)) < 0.2) & (drawn.labels_B > 0), 5_700.0, np.inf)
    one = drawn.user_B == drawn.user_B[0]
    ages_B[one] = 2_300.0
    without = drawn.counted(counting)
    told = replace(without, like_ages_KL=ages_B.astype(np.float32)[:, None])
    losses = [
        log_loss(drawn.labels_B[~one], cross_fitted(known, drawn.labels_B, drawn.user_B, drawn.rates())[~one])
        for known in (told, without)
    ]
    assert losses[0] < losses[1] + 0.01


def test_recent_likes_that_tell_the_label_get_a_weight() -> None:
    drawn = world(lambda rng, user, *rest: np.zeros(len(user)))
    rng = np.random.default_rng(3)
    recent_B = rng.random(len(drawn.labels_B)) < 0.4
    labels_B = (rng.random(len(recent_B)) < np.where(recent_B, 0.6, 0.4)).astype(np.int8)
    for counting in (STATIC, LIVE):
        without = drawn.counted(counting)
        told = replace(without, like_ages_KL=np.where(recent_B, 30.0, np.inf).astype(np.float32)[:, None])
        fitted = fit_weights(told, labels_B, drawn.user_B, drawn.rates()).weights
        assert fitted["recent_likes"].low > 0.1 and fitted["recent_taste"].value == 0
        likes_B = np.exp(-30 / 300) * recent_B
        assert fitted["recent_likes"].mean == pytest.approx(likes_B.mean(), abs=1e-5)
        assert fitted["recent_likes"].most == pytest.approx(likes_B.max(), abs=1e-5)
        gained, plain = (cross_fitted(one, labels_B, drawn.user_B, drawn.rates()) for one in (told, without))
        assert roc_auc_score(labels_B, gained) > roc_auc_score(labels_B, plain) + 0.05
        assert fit_weights(told, drawn.labels_B, drawn.user_B, drawn.rates()).weights["recent_likes"].low == 0
