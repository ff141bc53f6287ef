"""AUC, UAUC, log-loss and calibration error, each with a user-bootstrap interval.

Rows of one user are not independent, so users are resampled, not rows.

Shapes: B rows, U users, R bootstrap replicates.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Key = TypeVar("Key", bound=Hashable)

REPLICATES = 1000
LEAST_REPLICATES = 100
ROWS_REPLICATED = 200_000_000  # limit of rows times replicates, which takes seconds for a scorer
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % bootstrap interval; all None where the value is undefined."""

    value: float | None
    low: float | None
    high: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Return the interval as JSON holds it."""
        return {"value": self.value, "low": self.low, "high": self.high}


def auc(scores_B: NDArray[np.floating], labels_B: NDArray[np.floating]) -> float | None:
    """Return the area under the ROC curve, ties counted half; None unless both classes are there.

    It is also None if a score is not finite, as in all figures of this module: NaN has no place in an order.
    """
    replicas = _Replicas(np.zeros(len(scores_B), np.int64), 0, 0)
    area = _statistic("auc", scores_B, labels_B, replicas).of(np.ones(1))
    return None if np.isnan(area) else area


def uauc(scores_B: NDArray[np.floating], labels_B: NDArray[np.floating], users_B: NDArray[np.integer]) -> float | None:
    """Return the mean AUC over the users that have both classes; None when none has, or a score is not finite."""
    if not np.isfinite(scores_B).all():
        return None
    areas_U = _user_areas(scores_B, labels_B, np.unique(users_B, return_inverse=True)[1])
    return None if np.isnan(areas_U).all() else float(np.nanmean(areas_U))


def evaluate_scores(
    scores_B: NDArray[np.floating],
    labels_B: NDArray[np.floating],
    users_B: NDArray[np.integer],
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return auc, uauc, log_loss and ece with their intervals."""
    measured, _ = compare_scores({"": scores_B}, "", labels_B, users_B, replicates=replicates, seed=seed)
    return measured[""]


def compare_scores(
    scores: Mapping[str, NDArray[np.floating]],
    ours: str,
    labels_B: NDArray[np.floating],
    users_B: NDArray[np.integer],
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, Interval]]]:
    """Return auc, uauc, log_loss and ece of each scorer, and `ours` minus each other scorer in auc and uauc.

    All scorers are measured on the same resampled users; all scores are probabilities, `(B,)` each.
    """
    replicas = _Replicas(users_B, replicates, seed)
    samples = replicas.samples(
        {
            (name, metric): _statistic(metric, values_B, labels_B, replicas)
            for name, values_B in scores.items()
            for metric in _STATISTICS
        }
    )
    measured = {name: {metric: _interval(samples[name, metric]) for metric in _STATISTICS} for name in scores}
    differences = {
        name: {metric: _interval(samples[ours, metric] - samples[name, metric]) for metric in ("auc", "uauc")}
        for name in scores
        if name != ours
    }
    return measured, differences


def paired_difference(
    ours_B: NDArray[np.floating],
    theirs_B: NDArray[np.floating],
    labels_B: NDArray[np.floating],
    users_B: NDArray[np.integer],
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return ours minus theirs in auc and uauc on the same resampled users."""
    return _differences(ours_B, theirs_B, ("auc", "uauc"), labels_B, users_B, replicates, seed)


def log_loss_difference(
    ours_B: NDArray[np.floating],
    theirs_B: NDArray[np.floating],
    labels_B: NDArray[np.floating],
    users_B: NDArray[np.integer],
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Interval:
    """Return ours minus theirs in log-loss on the same resampled users; both are probabilities."""
    return _differences(ours_B, theirs_B, ("log_loss",), labels_B, users_B, replicates, seed)["log_loss"]


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of a few independent values with its 95 % t interval."""
    mean, error = float(np.mean(values)), float(stats.sem(values))
    reach = error * float(stats.t.ppf(0.975, len(values) - 1))
    return Interval(mean, mean - reach, mean + reach)


class Statistic(Protocol):
    """A figure of the rows as a function of how often each user counts."""

    def of(self, weights_U: Floats) -> float:
        """Return the figure, NaN where it is undefined."""
        ...

    def finish(self, values_R: Floats) -> Floats:
        """Return the values of all replicates, corrected where resampling shifts them."""
        ...


class _Replicas:
    """How often each user is drawn in each replicate; replicate 0 is the data itself.

    Weights are drawn again at each call: kept in memory they would take replicates times users numbers. Above
    `ROWS_REPLICATED` rows over all replicates there are fewer replicates, but at least `LEAST_REPLICATES`.
    """

    def __init__(self, users_B: NDArray[np.integer], replicates: int, seed: int) -> None:
        _, self.user_B = np.unique(users_B, return_inverse=True)
        self.users = int(self.user_B.max(initial=-1)) + 1
        affordable = max(LEAST_REPLICATES, ROWS_REPLICATED // max(1, len(users_B)))
        self._replicates, self._seed = min(replicates, affordable), seed

    def weights(self) -> Iterator[Floats]:
        """Yield the weights of the users, (U,), of each replicate; every call yields the same weights."""
        rng = np.random.default_rng(self._seed)
        yield np.ones(self.users)
        for _ in range(self._replicates):
            yield np.bincount(rng.integers(self.users, size=self.users), minlength=self.users).astype(np.float64)

    def samples(self, statistics: Mapping[Key, Statistic]) -> dict[Key, Floats]:
        """Return each statistic of every replicate, (R + 1,) each, NaN where it is undefined."""
        rows = [[statistic.of(weights_U) for statistic in statistics.values()] for weights_U in self.weights()]
        columns = np.array(rows, dtype=np.float64).reshape(-1, len(statistics)).T
        return {
            key: statistic.finish(values_R)
            for (key, statistic), values_R in zip(statistics.items(), columns, strict=True)
        }

    def sum_by_user(self, values_B: NDArray[np.floating]) -> Floats:
        """Return each user's sum over their rows, (U,)."""
        return np.bincount(self.user_B, weights=values_B, minlength=self.users).astype(np.float64)


class _Plain:
    def finish(self, values_R: Floats) -> Floats:
        return values_R


class _Area(_Plain):
    """AUC: rows sorted by score once, so that each replicate costs one pass."""

    def __init__(self, scores_B: NDArray[np.floating], labels_B: NDArray[np.floating], replicas: _Replicas) -> None:
        order = np.argsort(scores_B, kind="stable")
        self._user_of_rank = replicas.user_B[order]
        self._positive = np.asarray(labels_B)[order] > 0
        ranked = np.asarray(scores_B)[order]
        self._ties = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]]) if len(ranked) else np.zeros(0, np.int64)

    def of(self, weights_U: Floats) -> float:
        if not len(self._ties):
            return np.nan
        weights = weights_U[self._user_of_rank]
        positive = np.add.reduceat(np.where(self._positive, weights, 0.0), self._ties)
        negative = np.add.reduceat(np.where(self._positive, 0.0, weights), self._ties)
        total = positive.sum() * negative.sum()
        if total == 0:
            return np.nan
        below = np.cumsum(negative) - negative
        return float((positive * (below + negative / 2)).sum() / total)


class _UserArea(_Plain):
    """UAUC: the mean AUC over the users that have both classes."""

    def __init__(self, scores_B: NDArray[np.floating], labels_B: NDArray[np.floating], replicas: _Replicas) -> None:
        areas_U = _user_areas(scores_B, labels_B, replicas.user_B)
        self._known = ~np.isnan(areas_U)
        self._areas = areas_U[self._known]

    def of(self, weights_U: Floats) -> float:
        weights = weights_U[self._known]
        total = weights.sum()
        return float(weights @ self._areas / total) if total else np.nan


class _LogLoss(_Plain):
    def __init__(self, scores_B: NDArray[np.floating], labels_B: NDArray[np.floating], replicas: _Replicas) -> None:
        clipped_B = np.clip(scores_B.astype(np.float64), 1e-7, 1 - 1e-7)
        losses_B = -np.where(labels_B > 0, np.log(clipped_B), np.log1p(-clipped_B))
        self._loss_U = replicas.sum_by_user(losses_B)
        self._rows_U = replicas.sum_by_user(np.ones(len(losses_B)))

    def of(self, weights_U: Floats) -> float:
        return float(weights_U @ self._loss_U / (weights_U @ self._rows_U))


class _CalibrationError:
    """Expected calibration error over bins of equal width: mean |observed - predicted|, weighted by rows."""

    def __init__(self, scores_B: NDArray[np.floating], labels_B: NDArray[np.floating], replicas: _Replicas) -> None:
        scores_B = np.clip(scores_B.astype(np.float64), 1e-7, 1 - 1e-7)
        bins_B = np.minimum((scores_B * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
        gaps = [np.where(bins_B == index, labels_B - scores_B, 0.0) for index in range(CALIBRATION_BINS)]
        self._gap_U15 = np.stack([replicas.sum_by_user(gap_B) for gap_B in gaps], axis=1)
        self._rows_U = replicas.sum_by_user(np.ones(len(scores_B)))

    def of(self, weights_U: Floats) -> float:
        return float(np.abs(weights_U @ self._gap_U15).sum() / (weights_U @ self._rows_U))

    def finish(self, values_R: Floats) -> Floats:
        """Center the replicates on the data: resampling adds noise to every bin, and |.| turns noise into error."""
        values_R[1:] = np.maximum(0.0, values_R[1:] + values_R[0] - values_R[1:].mean())
        return values_R


class _Undefined(_Plain):
    """Every figure of scores that are not all finite."""

    def of(self, weights_U: Floats) -> float:
        return np.nan


_STATISTICS: Mapping[str, Callable[[NDArray[np.floating], NDArray[np.floating], _Replicas], Statistic]] = {
    "auc": _Area,
    "uauc": _UserArea,
    "log_loss": _LogLoss,
    "ece": _CalibrationError,
}


def _statistic(
    metric: str, scores_B: NDArray[np.floating], labels_B: NDArray[np.floating], replicas: _Replicas
) -> Statistic:
    return _STATISTICS[metric](scores_B, labels_B, replicas) if np.isfinite(scores_B).all() else _Undefined()


def _differences(
    ours_B: NDArray[np.floating],
    theirs_B: NDArray[np.floating],
    metrics: Sequence[str],
    labels_B: NDArray[np.floating],
    users_B: NDArray[np.integer],
    replicates: int,
    seed: int,
) -> dict[str, Interval]:
    replicas = _Replicas(users_B, replicates, seed)
    pairs = {"ours": ours_B, "theirs": theirs_B}
    samples = replicas.samples(
        {(who, name): _statistic(name, pairs[who], labels_B, replicas) for who in pairs for name in metrics}
    )
    return {name: _interval(samples["ours", name] - samples["theirs", name]) for name in metrics}


def _user_areas(scores_B: NDArray[np.floating], labels_B: NDArray[np.floating], user_B: NDArray[np.integer]) -> Floats:
    """Return each user's AUC by code, (U,), NaN where a class is missing: a rank sum within users, ties counted half.

    U = sum of the positives' mid-ranks - n1 (n1 + 1) / 2; AUC = U / (n1 n0).
    """
    if not len(scores_B):
        return np.zeros(0)
    order = np.lexsort((scores_B, user_B))
    user, score, positive = user_B[order], np.asarray(scores_B)[order], np.asarray(labels_B)[order] > 0
    fresh = np.r_[True, (user[1:] != user[:-1]) | (score[1:] != score[:-1])]
    tie = np.cumsum(fresh) - 1
    starts = np.flatnonzero(fresh)
    middle = starts + (np.diff(np.r_[starts, len(score)]) + 1) / 2  # ranks from 1, over all users
    rows_U = np.bincount(user)
    positive_U = np.bincount(user, weights=positive)
    offset_U = np.cumsum(rows_U) - rows_U
    ranks_U = np.bincount(user, weights=np.where(positive, middle[tie] - offset_U[user], 0.0))
    negative_U = rows_U - positive_U
    with np.errstate(invalid="ignore", divide="ignore"):
        areas: Floats = (ranks_U - positive_U * (positive_U + 1) / 2) / (positive_U * negative_U)
    areas[positive_U * negative_U == 0] = np.nan
    return areas


def _interval(samples_R: Floats) -> Interval:
    if np.isnan(samples_R[0]):
        return Interval(None, None, None)
    low, high = np.nanpercentile(samples_R[1:], [2.5, 97.5])
    return Interval(float(samples_R[0]), float(low), float(high))
