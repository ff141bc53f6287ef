"""The latest scores of one bundle whose outcomes are known, and how good they were."""

from dataclasses import dataclass

import numpy as np

BINS = 10
# Probabilities are kept this far from 0 and 1 where their logarithm is taken.
_EPSILON = 1e-7


@dataclass(frozen=True, slots=True)
class Figures:
    """How good labelled scores are; None where the labels do not allow the figure."""

    labelled: int
    positives: int
    auc: float | None  # ties count half; None unless both labels occur
    log_loss: float | None
    calibration_ratio: float | None  # mean score over the share of positives; None without positives
    calibration_error: float | None  # expected calibration error over ten bins of equal width


class LabelledWindow:
    """A ring of the last `size` labelled scores; 5 bytes each."""

    def __init__(self, size: int) -> None:
        self._scores = np.zeros(size, np.float32)
        self._labels = np.zeros(size, np.bool_)
        self._seen = 0
        self._figures: Figures | None = None

    def add(self, score: float, label: bool) -> int:
        """Take a labelled score and return its number, by which it can be labelled anew."""
        number = self._seen
        self._seen += 1
        self._scores[number % len(self._scores)] = score
        self._labels[number % len(self._labels)] = label
        self._figures = None
        return number

    def relabel(self, number: int, label: bool) -> None:
        """Change a label, unless it has left the window."""
        if number >= self._seen - len(self._labels):
            self._labels[number % len(self._labels)] = label
            self._figures = None

    def figures(self) -> Figures:
        """Return how good the scores in the window are; computed anew only after a change."""
        if self._figures is None:
            held = min(self._seen, len(self._scores))
            self._figures = figures_of(self._scores[:held].astype(np.float64), self._labels[:held])
        return self._figures


def figures_of(scores_N: np.ndarray, labels_N: np.ndarray) -> Figures:
    """Return the figures of scores (float64 probabilities) and labels (booleans)."""
    count, positives = len(scores_N), int(labels_N.sum())
    if not count:
        return Figures(0, 0, None, None, None, None)
    clipped_N = np.clip(scores_N, _EPSILON, 1 - _EPSILON)
    log_loss = -np.where(labels_N, np.log(clipped_N), np.log1p(-clipped_N)).mean()
    return Figures(
        labelled=count,
        positives=positives,
        auc=_auc(scores_N, labels_N) if 0 < positives < count else None,
        log_loss=float(log_loss),
        calibration_ratio=float(scores_N.sum() / positives) if positives else None,
        calibration_error=_calibration_error(scores_N, labels_N),
    )


def _auc(scores_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Return the chance that a positive scores above a negative, from rank sums; tied scores share their mean rank."""
    _, inverse_N, copies = np.unique(scores_N, return_inverse=True, return_counts=True)
    last = np.cumsum(copies)
    ranks_N = (last - (copies - 1) / 2)[inverse_N]
    positives = int(labels_N.sum())
    above = float(ranks_N[labels_N].sum()) - positives * (positives + 1) / 2
    return above / (positives * (len(scores_N) - positives))


def _calibration_error(scores_N: np.ndarray, labels_N: np.ndarray) -> float:
    bins_N = np.minimum((scores_N * BINS).astype(np.int64), BINS - 1)
    predicted = np.bincount(bins_N, weights=scores_N, minlength=BINS)
    observed = np.bincount(bins_N, weights=labels_N.astype(np.float64), minlength=BINS)
    return float(np.abs(predicted - observed).sum() / len(scores_N))
