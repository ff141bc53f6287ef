"""AUC, UAUC, log-loss and calibration error, each with a user-bootstrap interval.

Rows of one user are not independent, so users are resampled, not rows.

Shapes: B rows, U users, R bootstrap replicates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

REPLICATES = 1000
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
    """Return the area under the ROC curve, ties counted half; None unless both classes are there."""
    return _RankedRows(scores_B, labels_B).auc(np.ones(len(scores_B)))


def uauc(scores_B: NDArray[np.floating], labels_B: NDArray[np.floating], users_B: NDArray[np.integer]) -> float | None:
    """Return the mean AUC over the users that have both classes; None when none has."""
    _, areas_U = _user_areas(scores_B, labels_B, users_B)
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
    replicas = _Replicas(users_B, replicates, seed)
    clipped = _clipped(scores_B)
    samples = {
        "auc": _auc_samples(scores_B, labels_B, replicas),
        "uauc": _uauc_samples(scores_B, labels_B, users_B, replicas),
        "log_loss": _log_loss_samples(clipped, labels_B, replicas),
        "ece": _ece_samples(clipped, labels_B, replicas),
    }
    return {name: _interval(values_R) for name, values_R in samples.items()}


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
    replicas = _Replicas(users_B, replicates, seed)
    return {
        "auc": _interval(_auc_samples(ours_B, labels_B, replicas) - _auc_samples(theirs_B, labels_B, replicas)),
        "uauc": _interval(
            _uauc_samples(ours_B, labels_B, users_B, replicas) - _uauc_samples(theirs_B, labels_B, users_B, replicas)
        ),
    }


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
    replicas = _Replicas(users_B, replicates, seed)
    ours_R, theirs_R = (_log_loss_samples(_clipped(one), labels_B, replicas) for one in (ours_B, theirs_B))
    return _interval(ours_R - theirs_R)


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of a few independent values with its 95 % t interval."""
    mean, error = float(np.mean(values)), float(stats.sem(values))
    reach = error * float(stats.t.ppf(0.975, len(values) - 1))
    return Interval(mean, mean - reach, mean + reach)


class _Replicas:
    """How often each user is drawn in each replicate; replicate 0 is the data itself."""

    def __init__(self, users_B: NDArray[np.integer], replicates: int, seed: int) -> None:
        _, self.user_B = np.unique(users_B, return_inverse=True)
        self._users = users = int(self.user_B.max(initial=-1)) + 1
        rng = np.random.default_rng(seed)
        drawn = [np.bincount(rng.integers(users, size=users), minlength=users) for _ in range(replicates)]
        self.weights_RU: Floats = np.array([np.ones(users), *drawn], dtype=np.float64)
        self.rows_R = self.weights_RU @ self.sum_by_user(np.ones(len(users_B)))

    def sum_by_user(self, values_B: NDArray[np.floating]) -> Floats:
        """Return each user's sum over their rows, (U,)."""
        return np.bincount(self.user_B, weights=values_B, minlength=self._users).astype(np.float64)


class _RankedRows:
    """Rows sorted by score once, so that each reweighting costs one pass."""

    def __init__(self, scores_B: NDArray[np.floating], labels_B: NDArray[np.floating]) -> None:
        self._order = np.argsort(scores_B, kind="stable")
        self._positive = np.asarray(labels_B)[self._order] > 0
        ranked = np.asarray(scores_B)[self._order]
        self._ties = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]]) if len(ranked) else np.zeros(0, np.int64)

    def auc(self, weights_B: NDArray[np.floating]) -> float | None:
        if not len(self._ties):
            return None
        weights = weights_B[self._order]
        positive = np.add.reduceat(np.where(self._positive, weights, 0.0), self._ties)
        negative = np.add.reduceat(np.where(self._positive, 0.0, weights), self._ties)
        total = positive.sum() * negative.sum()
        if total == 0:
            return None
        below = np.cumsum(negative) - negative
        return float((positive * (below + negative / 2)).sum() / total)


def _auc_samples(scores_B: NDArray[np.floating], labels_B: NDArray[np.floating], replicas: _Replicas) -> Floats:
    ranked = _RankedRows(scores_B, labels_B)
    areas = [ranked.auc(weights_U[replicas.user_B]) for weights_U in replicas.weights_RU]
    return np.array([np.nan if area is None else area for area in areas])


def _clipped(scores_B: NDArray[np.floating]) -> Floats:
    return np.clip(scores_B.astype(np.float64), 1e-7, 1 - 1e-7)


def _log_loss_samples(clipped_B: Floats, labels_B: NDArray[np.floating], replicas: _Replicas) -> Floats:
    losses_B = -np.where(labels_B > 0, np.log(clipped_B), np.log1p(-clipped_B))
    losses_R: Floats = replicas.weights_RU @ replicas.sum_by_user(losses_B) / replicas.rows_R
    return losses_R


def _uauc_samples(
    scores_B: NDArray[np.floating], labels_B: NDArray[np.floating], users_B: NDArray[np.integer], replicas: _Replicas
) -> Floats:
    _, areas_U = _user_areas(scores_B, labels_B, users_B)
    known = ~np.isnan(areas_U)
    weights = replicas.weights_RU[:, known]
    with np.errstate(invalid="ignore"):
        samples: Floats = weights @ areas_U[known] / weights.sum(axis=1)
    return samples


def _user_areas(
    scores_B: NDArray[np.floating], labels_B: NDArray[np.floating], users_B: NDArray[np.integer]
) -> tuple[NDArray[np.integer], Floats]:
    """Return the users in order and each one's AUC, NaN where a class is missing."""
    users_U, starts = np.unique(np.sort(users_B, kind="stable"), return_index=True)
    order = np.argsort(users_B, kind="stable")
    areas = [auc(scores_B[rows], labels_B[rows]) for rows in np.split(order, starts[1:])] if len(users_U) else []
    return users_U, np.array([np.nan if area is None else area for area in areas], dtype=np.float64)


def _ece_samples(scores_B: Floats, labels_B: NDArray[np.floating], replicas: _Replicas) -> Floats:
    """Expected calibration error over bins of equal width: mean |observed - predicted|, weighted by rows."""
    bins_B = np.minimum((scores_B * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gap_R = np.zeros(len(replicas.weights_RU))
    for index in range(CALIBRATION_BINS):
        inside = np.where(bins_B == index, labels_B - scores_B, 0.0)
        gap_R += np.abs(replicas.weights_RU @ replicas.sum_by_user(inside))
    gaps: Floats = gap_R / replicas.rows_R
    # Resampling adds noise to every bin, and |.| turns noise into error: the replicates are centered on the data.
    gaps[1:] = np.maximum(0.0, gaps[1:] + gaps[0] - gaps[1:].mean())
    return gaps


def _interval(samples_R: Floats) -> Interval:
    if np.isnan(samples_R[0]):
        return Interval(None, None, None)
    low, high = np.nanpercentile(samples_R[1:], [2.5, 97.5])
    return Interval(float(samples_R[0]), float(low), float(high))
