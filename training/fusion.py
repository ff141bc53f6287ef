"""Fits the fusion: the smoothing of the rates on train, the weights on valid.

The weights come from a logistic regression with bounds (only cold flags may have negative weights) and a penalty. The
penalty pulls towards a smaller model of three weights: one for the whole collaborative prediction, one for the language
model, one for both rates. Static counts and live counts get separate fits. Static rates say little beyond the
collaborative prediction, which comes from the same labels. So the smaller model of static counts has no rates, and the
cold flags have weight zero.

With live counts the log-loss alone rewards the order of users more than the order of one user's items, which `/rank`
serves. The two disagree: a user's rate is counted without the row, so it is lower before a like than before a dislike.
So the loss with live counts has a second term, over pairs of a positive and a negative row of the same user. At the end
the logits of both fits are calibrated, by one intercept and one factor.

A row that fits the weights must not judge them. `cross_fitted` scores each row of valid by weights that were fitted on
other users' rows.

Shapes: B rows of valid, N rows of a fit, P pairs of rows, J inputs, S weights of the smaller model, U users, F folds.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.optimize import lsq_linear, minimize, minimize_scalar
from scipy.special import betaln, expit

from models.fusion import INPUTS, RECENT, SIGNED, Doubles, Floats, Fusion, Known, Rates, Weight, Weights, fusion_inputs
from training.counts import counts_by_id

PENALTY_ROWS = 5.0  # the penalty on each weight of the smaller model, in rows
# The penalty on all weights, in users, because the rows of one user carry much the same information. The valid split of
# MovieLens-1M has 10,401 rows of 356 users; weighted by their rows, its most active users make them count as 96.
PENALTY_USERS = 2.0
# The penalty on cold flags, relative: a weight fitted on a few cold users seldom holds for others.
COLD_PENALTY = 50.0
PAIR_WEIGHT = 1.0  # weight of the loss over pairs; a user's pairs together count as many rows as the user has
# A user has at most PAIRS_PER_ROW pairs for each row; with more, a random sample is taken. With many rows the limit
# falls to MAX_PAIRS / rows, but not below one pair for each row.
PAIRS_PER_ROW, MAX_PAIRS = 16, 500_000
LEAST_ROWS, LEAST_OF_A_CLASS = 50, 10  # with fewer, the thirteen weights would be noise
FOLDS = 5
REPLICATES = 300
ROWS_AT_ONCE = 100_000
STRENGTHS = (0.5, 200.0)
NAMES = tuple(INPUTS)
COLLAB = np.array([INPUTS[name] == "collab" for name in NAMES])
LM = np.array([name == "lm" for name in NAMES])
RATES = np.array([name in ("user_rate", "item_rate") for name in NAMES])
COLD = np.array([name in SIGNED for name in NAMES])
COUNTED = np.array([name in RECENT for name in NAMES])


def fit_rates(train: pl.DataFrame) -> Rates:
    """Return the base rate of train, and the strengths of smoothing fitted to its users and items.

    A strength maximises the beta-binomial likelihood of the counts with the mean at the base rate, under a weak
    log-normal prior at the default: users or items with one impression say nothing about a strength.
    """
    weights, labels = train["weight"].to_numpy().astype(np.float64), train["label"].to_numpy()
    edge = 1 / (train.height + 2)  # if train has one class
    base = float(np.clip((weights * labels).sum() / weights.sum(), edge, 1 - edge))
    default = Rates()
    return Rates(
        base=base,
        user_strength=_strength(counts_by_id(train, "user_id"), base, default.user_strength),
        item_strength=_strength(counts_by_id(train, "item_id"), base, default.item_strength),
    )


def fit_fusion(
    static: Known, live: Known, labels_B: NDArray[np.number], users_B: NDArray[np.integer], rates: Rates
) -> Fusion:
    """Return the fusion fitted on all rows, whose inputs are given with static and with live counts.

    Raises:
        ValueError: the counts are not static and live, in this order.
    """
    if static.live or not live.live:
        raise ValueError(f"static.live is {static.live}, live.live is {live.live}; give static counts, then live ones")
    fitted = [fit_weights(known, labels_B, users_B, rates) for known in (static, live)]
    return Fusion(rates=rates, static=fitted[0], live=fitted[1])


def fit_weights(known: Known, labels_B: NDArray[np.number], users_B: NDArray[np.integer], rates: Rates) -> Weights:
    """Return the weights fitted on all rows, for the kind of counts (static or live) in `known`.

    Intervals are percentiles of a bootstrap over users. Each replicate takes one Newton step from the fitted weights,
    under the same bounds, so that hundreds of replicates cost less than the fit.
    """
    design = _Design.of(known, labels_B, users_B, rates)
    fitted = _fit(design, rates)
    low_J = high_J = fitted.weights_J
    if fitted.minimum is not None:
        low_J, high_J = _intervals(design, fitted.minimum)
    inputs_NJ = design.inputs_NJ if len(design.inputs_NJ) else np.zeros((1, len(NAMES)))
    rounded = [
        np.round(one, 6) for one in (fitted.weights_J, low_J, high_J, inputs_NJ.mean(axis=0), inputs_NJ.max(axis=0))
    ]
    return Weights(
        intercept=round(fitted.intercept, 6),
        weights={
            name: Weight(value=value, low=low, high=high, mean=mean, most=most)
            for name, value, low, high, mean, most in zip(NAMES, *(one.tolist() for one in rounded), strict=True)
        },
    )


def cross_fitted(
    known: Known,
    labels_B: NDArray[np.number],
    users_B: NDArray[np.integer],
    rates: Rates,
    *,
    folds: int = FOLDS,
    seed: int = 0,
) -> Floats:
    """Return scores, `(B,)`; the weights for each row were fitted on the rows of other users.

    If the users of a fold have many positives, the weights that leave them out have a low intercept. This would lower
    the AUC of any scorer over all rows, by 0.004 for 350 users. So the logits that each fold's weights give to all rows
    are shifted and scaled to a common mean and spread, the averages over the folds. One map for all rows of a fold does
    not change their order.
    """
    design = _Design.of(known, labels_B, users_B, rates)
    users, code_N = np.unique(design.user_N, return_inverse=True)
    fold_N = (np.random.default_rng(seed).permutation(len(users)) % folds)[code_N]
    fitted = [_fit(design.only(fold_N != fold), rates) for fold in range(folds)]
    everywhere_FN = np.array([one.logits(design.inputs_NJ) for one in fitted])
    mean_F, spread_F = everywhere_FN.mean(axis=1), everywhere_FN.std(axis=1)
    own_N = everywhere_FN[fold_N, np.arange(len(fold_N))]
    scale_F = spread_F.mean() / np.where(spread_F > 0, spread_F, 1.0)
    scores_N = expit((own_N - mean_F[fold_N]) * scale_F[fold_N] + mean_F.mean())
    return np.asarray(scores_N, np.float32)


def enough_to_fit(labels_N: NDArray[np.bool_]) -> bool:
    """Return whether rows with these labels are enough to fit weights; with fewer, weights that need no data stay."""
    positive, rows = labels_N.sum(), len(labels_N)
    return bool(rows >= LEAST_ROWS and min(positive, rows - positive) >= LEAST_OF_A_CLASS)


def scores_of(fusion: Fusion, known: Known) -> Floats:
    """Return the fusion's scores of any number of rows, `(B,)`, in bounded memory."""
    return np.concatenate([np.zeros(0, np.float32), *(fusion(part) for part in _parts(known))])


@dataclass(frozen=True)
class _Design:
    """The rows of a fit, whose counts are live or static."""

    inputs_NJ: Doubles
    labels_N: NDArray[np.bool_]
    user_N: NDArray[np.integer]
    live: bool

    @classmethod
    def of(cls, known: Known, labels_B: NDArray[np.number], users_B: NDArray[np.integer], rates: Rates) -> "_Design":
        columns = [np.stack(list(fusion_inputs(part, rates).values()), axis=1) for part in _parts(known)]
        return cls(np.concatenate([np.zeros((0, len(NAMES))), *columns]), labels_B > 0, users_B, known.live)

    def only(self, chosen_N: NDArray[np.bool_]) -> "_Design":
        return _Design(self.inputs_NJ[chosen_N], self.labels_N[chosen_N], self.user_N[chosen_N], self.live)

    def pairs(self) -> "_Pairs":
        """Return pairs of a positive and a negative row of the same user."""
        order = np.argsort(self.user_N, kind="stable")
        rng = np.random.default_rng(len(order))
        per_row = max(1, min(PAIRS_PER_ROW, MAX_PAIRS // max(1, len(order))))
        chosen = []
        for rows in np.split(order, np.flatnonzero(np.diff(self.user_N[order])) + 1):
            positive, negative = rows[self.labels_N[rows]], rows[~self.labels_N[rows]]
            count = len(positive) * len(negative)
            most = per_row * len(rows)
            place = np.arange(count) if count <= most else rng.integers(count, size=most)
            if count:
                weight = np.full(len(place), PAIR_WEIGHT * len(rows) / len(place))
                chosen.append((positive[place % len(positive)], negative[place // len(positive)], weight))
        nothing = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
        return _Pairs(*(np.concatenate(parts) for parts in zip(nothing, *chosen, strict=True)))

    @property
    def smaller(self) -> list[NDArray[np.bool_]]:
        """The inputs, `(J,)`, of each weight of the smaller model."""
        return [COLLAB, LM, RATES] if self.live else [COLLAB, LM]

    @property
    def penalty_rows(self) -> float:
        """The penalty in rows: `PENALTY_USERS` times the mean rows a user, weighted by each user's rows."""
        rows_U = np.unique(self.user_N, return_counts=True)[1]
        return float(PENALTY_USERS * (rows_U**2).sum() / rows_U.sum())

    @property
    def enough(self) -> bool:
        """Whether there are enough rows to fit weights."""
        return enough_to_fit(self.labels_N)


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a positive and a negative row of one user, `(P,)`, and the weight of each in the loss."""

    positive_P: NDArray[np.integer]
    negative_P: NDArray[np.integer]
    weight_P: Doubles


@dataclass(frozen=True)
class _Fitted:
    intercept: float
    weights_J: Doubles
    most_J: Doubles  # the largest value of each count of recent likes in the fit, infinite for other inputs
    minimum: "_Minimum | None" = None  # None where nothing was fitted

    def logits(self, inputs_NJ: Doubles) -> Doubles:
        # As in serving: a rare count beyond the fitted rows, times a large weight, would decide the spread of a fold.
        return np.asarray(self.intercept + np.minimum(inputs_NJ, self.most_J) @ self.weights_J)


@dataclass(frozen=True)
class _Minimum:
    """The weights before the calibration, and the factor by which the calibration multiplies them."""

    model: "_Penalised"
    weights: Doubles
    factor: float


class _Penalised:
    """A logistic loss over standardised inputs and pairs, with its penalty: a function of [intercept, weights]."""

    def __init__(
        self,
        inputs_NJ: Doubles,
        labels_N: NDArray[np.bool_],
        prior_J: Doubles,
        bounds_J: tuple[Doubles, Doubles],
        penalty_rows_J: Doubles,
        pairs: _Pairs | None = None,
    ) -> None:
        self.mean_J = inputs_NJ.mean(axis=0)
        spread_J = inputs_NJ.std(axis=0)
        # A constant input acts like the intercept: the penalty alone sets its weight.
        self.spread_J = np.where(spread_J > 1e-9, spread_J, 1.0)
        self.inputs_NJ = np.column_stack([np.ones(len(inputs_NJ)), (inputs_NJ - self.mean_J) / self.spread_J])
        self.labels_N = labels_N
        self.pairs = pairs
        if pairs is not None:  # the intercept cancels
            self.apart_PJ = self.inputs_NJ[pairs.positive_P] - self.inputs_NJ[pairs.negative_P]
        self.prior = np.concatenate([[0.0], prior_J * self.spread_J])
        # A row weighs at most 1/4 in the curvature of a logistic loss. The intercept is not penalised.
        self.penalty = np.concatenate([[0.0], penalty_rows_J / 4])
        self.low, self.high = (
            np.concatenate([[edge], one_J]) for edge, one_J in zip((-np.inf, np.inf), bounds_J, strict=True)
        )

    def loss(self, weights: Doubles) -> tuple[float, Doubles]:
        """Return the mean loss and its gradient."""
        logits_N = self.inputs_NJ @ weights
        signed_N = np.where(self.labels_N, -logits_N, logits_N)
        away = weights - self.prior
        loss = np.logaddexp(0, signed_N).sum() + (self.penalty * away**2).sum() / 2
        gradient = self.inputs_NJ.T @ self.residuals(weights) + self.penalty * away
        if self.pairs is not None:
            loss += (self.pairs.weight_P * np.logaddexp(0, -self.apart_PJ @ weights)).sum()
            gradient += self.apart_PJ.T @ self.pair_residuals(weights)
        return float(loss / len(logits_N)), gradient / len(logits_N)

    def residuals(self, weights: Doubles) -> Doubles:
        return np.asarray(expit(self.inputs_NJ @ weights) - self.labels_N)

    def pair_residuals(self, weights: Doubles) -> Doubles:
        assert self.pairs is not None
        return np.asarray(-self.pairs.weight_P * expit(-self.apart_PJ @ weights))

    def curvature(self, weights: Doubles) -> Doubles:
        """Return the Hessian of the summed loss and penalty."""
        chance_N = expit(self.inputs_NJ @ weights)
        weighted_NJ = self.inputs_NJ * (chance_N * (1 - chance_N))[:, None]
        curvature = weighted_NJ.T @ self.inputs_NJ + np.diag(self.penalty)
        if self.pairs is not None:
            chance_P = expit(self.apart_PJ @ weights)
            curvature += (self.apart_PJ.T * (self.pairs.weight_P * chance_P * (1 - chance_P))) @ self.apart_PJ
        return np.asarray(curvature)

    def minimum(self) -> Doubles:
        bounds = list(zip(self.low, self.high, strict=True))
        start = np.clip(self.prior, self.low, self.high)
        options = {"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-8}
        return np.asarray(minimize(self.loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x)

    def unscaled(self, weights: Doubles) -> tuple[float, Doubles]:
        """Return the intercept and the weights of the inputs in their own units."""
        weights_J = weights[1:] / self.spread_J
        return float(weights[0] - weights_J @ self.mean_J), weights_J


def _fit(design: _Design, rates: Rates) -> _Fitted:
    """Fit all weights, pulled towards the smaller model; with too few rows return the weights that need no data."""
    without_data = _prior(rates)
    if not design.enough:
        return without_data
    members_SJ = np.array(design.smaller)
    size = len(members_SJ)
    prior_S = np.array([without_data.weights_J[one_J].max() for one_J in members_SJ])
    positive_S = np.zeros(size), np.full(size, np.inf)
    small = _Penalised(
        design.inputs_NJ @ members_SJ.T, design.labels_N, prior_S, positive_S, np.full(size, PENALTY_ROWS)
    )
    prior_J = small.unscaled(small.minimum())[1] @ members_SJ
    cold_low, cold_high = (-np.inf, np.inf) if design.live else (0.0, 0.0)
    bounds_J = np.where(COLD, cold_low, 0.0), np.where(COLD, cold_high, np.inf)
    penalty_rows_J = design.penalty_rows * np.where(COLD, COLD_PENALTY, 1.0)
    pairs = design.pairs() if design.live else None
    whole = _Penalised(design.inputs_NJ, design.labels_N, prior_J, bounds_J, penalty_rows_J, pairs)
    minimum = whole.minimum()
    intercept, weights_J = whole.unscaled(minimum)
    offset, factor = _calibration(intercept + design.inputs_NJ @ weights_J, design.labels_N)
    most_J = np.where(COUNTED, design.inputs_NJ.max(axis=0), np.inf)
    return _Fitted(offset + factor * intercept, factor * weights_J, most_J, _Minimum(whole, minimum, factor))


def _calibration(logits_N: Doubles, labels_N: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the intercept and the factor, not negative, that make logits fit their labels best."""
    bounds = np.zeros(1), np.full(1, np.inf)
    model = _Penalised(logits_N[:, None], labels_N, np.ones(1), bounds, np.full(1, PENALTY_ROWS))
    offset, [factor] = model.unscaled(model.minimum())
    return offset, float(factor)


def _prior(rates: Rates) -> _Fitted:
    """Return the fusion that needs no data: the mean of both predictions' log-odds.

    Matrix factorisation predicts the label itself; its log-odds are linearised at the base rate.
    """
    slope = 1 / (rates.base * (1 - rates.base))
    intercept = (np.log(rates.base / (1 - rates.base)) - slope * rates.base) / 2
    return _Fitted(float(intercept), COLLAB * slope / 2 + LM * 0.5, np.full(len(NAMES), np.inf))


def _intervals(design: _Design, minimum: _Minimum, seed: int = 0) -> tuple[Doubles, Doubles]:
    """Return the 2.5 % and 97.5 % percentiles of every weight over a bootstrap of users; the weight lies in between."""
    model, center = minimum.model, minimum.weights
    triangle = np.linalg.cholesky(model.curvature(center))
    _, code_N = np.unique(design.user_N, return_inverse=True)
    users = int(code_N.max()) + 1
    gradient_UJ = _sums(code_N, model.inputs_NJ * model.residuals(center)[:, None], users)
    if model.pairs is not None:
        each_PJ = model.apart_PJ * model.pair_residuals(center)[:, None]
        gradient_UJ += _sums(code_N[model.pairs.positive_P], each_PJ, users)
    pull = model.penalty * (center - model.prior)
    rng = np.random.default_rng(seed)
    bounds = (model.low - 1e-12, model.high + 1e-12)  # lsq_linear needs each lower bound below the upper
    steps = []
    for _ in range(REPLICATES):
        drawn_U = np.bincount(rng.integers(users, size=users), minlength=users)
        target = triangle.T @ center - solve_triangular(triangle, drawn_U @ gradient_UJ + pull, lower=True)
        steps.append(lsq_linear(triangle.T, target, bounds, method="bvls").x)
    weights_RJ = np.clip(np.array(steps)[:, 1:], model.low[1:], model.high[1:])
    low_J, high_J = np.percentile(weights_RJ, [2.5, 97.5], axis=0)
    scale_J = minimum.factor / model.spread_J
    return scale_J * np.minimum(low_J, center[1:]), scale_J * np.maximum(high_J, center[1:])


def _sums(code_N: NDArray[np.integer], values_NJ: Doubles, size: int) -> Doubles:
    """Return the sum of the rows of each code, `(size, J)`."""
    return np.stack([np.bincount(code_N, weights=column, minlength=size) for column in values_NJ.T], axis=1)


def _strength(counts: pl.DataFrame, base: float, default: float) -> float:
    # Ids with equal counts become one term.
    distinct = counts.group_by("impressions", "positives").agg(ids=pl.len()).sort("impressions", "positives")
    hits, ids = distinct["positives"].to_numpy(), distinct["ids"].to_numpy()
    misses = distinct["impressions"].to_numpy() - hits

    def loss(log_strength: float) -> float:
        alpha, beta = np.exp(log_strength) * base, np.exp(log_strength) * (1 - base)
        likelihood = (ids * (betaln(hits + alpha, misses + beta) - betaln(alpha, beta))).sum()
        return float(((log_strength - np.log(default)) / np.log(10)) ** 2 / 2 - likelihood)

    low, high = np.log(STRENGTHS)
    return round(float(np.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x)), 6)


def _parts(known: Known) -> list[Known]:
    """Cut rows into parts of `ROWS_AT_ONCE`: the inputs' products take several times the vectors' memory."""
    return [known.rows(slice(start, start + ROWS_AT_ONCE)) for start in range(0, len(known.lm_K), ROWS_AT_ONCE)]
