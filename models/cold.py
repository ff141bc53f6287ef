"""Vectors for what was never trained: a user folded in from a history, an item mapped from its text.

Shapes: L liked items of a history, H impressions with a known outcome, N rows, C = d_C, D = d_L.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
NO_TIMES = np.zeros(0)


@dataclass(frozen=True)
class UserPrior:
    """The Gaussian of the trained users' vectors, and how it observes a liked item or a known outcome.

    A history holds positives alone, so observing each as label 1 would make every new user look lenient. Each is
    observed as `target` instead, with variance `noise`: the two are fitted on train users treated as new. Impressions
    with a known outcome include the negatives: each is observed as its label, 1 or 0, with variance `outcome_noise`.

    A user's bias also drifts: a user may like nearly everything that they see today, and little of what they see next
    week. The drift is a stationary Ornstein-Uhlenbeck process: its covariance at two moments is `drift_variance` times
    exp(-seconds between them / `drift_seconds`). Recent outcomes therefore say more about the moment of the score.

    Attributes:
        mean_C: the mean of the trained users' vectors.
        covariance_CC: their covariance; zero in the constant dimension.
        outcome_noise: the variance of an outcome. A bundle holds twice the variance of a label around stage 2's
            prediction without this label; the strength and the drift are fitted with the single variance.
        strength: the number of train impressions after which half of the covariance is left.
        drift_variance: the variance of the drift of a user's bias; 0 for no drift.
        drift_seconds: the time after which the drift's correlation is 1 / e.
    """

    mean_C: Floats
    covariance_CC: Floats
    target: float
    noise: float
    outcome_noise: float
    strength: float
    drift_variance: float = 0.0
    drift_seconds: float = 1.0

    def fold_in(self, liked_LC: Floats) -> Floats:
        """Return the posterior mean of a user who liked these items, `(C,)`; the prior mean for none."""
        return self._posterior(self.mean_C, 1.0, liked_LC, *self._liked(len(liked_LC)))

    def updated(
        self,
        vector_C: Floats | None,
        impressions: int,
        items_HC: Floats,
        labels_H: Floats,
        times_H: NDArray[np.float64],
        at: float,
        liked_LC: Floats,
    ) -> Floats:
        """Return a user's vector, `(C,)`, updated with impressions that have a known outcome.

        `times_H` are the impressions' times and `at` is the moment of the score, UTC seconds; at infinity the drift
        is over.

        For a trained user, `vector_C` is the trained vector and `impressions` the number of train impressions in it:
        the more of them, the smaller the remaining variance. `liked_LC` is not used. For a cold user, `vector_C` is
        None: the prior mean is updated, and `liked_LC`, the liked items without a positive outcome in `labels_H`, are
        observed as in `fold_in`. Without observations the vector stays the same.
        """
        noise_H = np.full(len(items_HC), self.outcome_noise, np.float32)
        if vector_C is not None:
            left = self.strength / (self.strength + impressions)
            return self._posterior(vector_C, left, items_HC, labels_H, noise_H, times_H, at)
        target_L, noise_L = self._liked(len(liked_LC))
        observed, noise = np.concatenate([labels_H, target_L]), np.concatenate([noise_H, noise_L])
        return self._posterior(self.mean_C, 1.0, np.concatenate([items_HC, liked_LC]), observed, noise, times_H, at)

    def drift(self, between: NDArray[np.float64]) -> Floats:
        """Return the covariance of the drift at moments that are these seconds apart; same shape."""
        return np.asarray(self.drift_variance * np.exp(-np.abs(between) / self.drift_seconds), np.float32)

    def _liked(self, count: int) -> tuple[Floats, Floats]:
        """Return the observed value and the variance of `count` liked items, `(L,)` each."""
        return np.full(count, self.target, np.float32), np.full(count, self.noise, np.float32)

    def _posterior(
        self,
        mean_C: Floats,
        left: float,
        items_HC: Floats,
        observed_H: Floats,
        noise_H: Floats,
        times_A: NDArray[np.float64] = NO_TIMES,
        at: float = np.inf,
    ) -> Floats:
        """Return u = m + (S V' + d) (V S V' + D + N)^-1 (y - V m), `(C,)`, where S is `left` times the covariance.

        D is the drift's covariance between the first A observations, whose times are given; d, in the dimension of the
        bias, is its covariance between them and the moment `at`. This form does not invert S, which is singular.
        """
        if len(items_HC) == 0:
            return mean_C
        gain_CH = np.float32(left) * (self.covariance_CC @ items_HC.T)
        system_HH = items_HC @ gain_CH + np.diag(noise_H)
        timed = len(times_A)
        system_HH[:timed, :timed] += self.drift(np.subtract.outer(times_A, times_A))
        # A vector ends in b_u, 1. An outcome after the moment, by another machine's clock, counts as of the moment.
        gain_CH[-2, :timed] += self.drift(np.maximum(at - times_A, 0.0))
        residual_H = observed_H - items_HC @ mean_C
        posterior_C: Floats = (mean_C + gain_CH @ np.linalg.solve(system_HH, residual_H)).astype(np.float32)
        return posterior_C


@dataclass(frozen=True)
class TextMap:
    """A ridge map from an item's semantic vector to its collab vector."""

    center_D: Floats
    weight_DC: Floats
    offset_C: Floats

    def __call__(self, semantic_ND: Floats) -> Floats:
        """Return the mapped collab vectors, `(N, C)`."""
        mapped: Floats = ((semantic_ND - self.center_D) @ self.weight_DC + self.offset_C).astype(np.float32)
        return mapped


def fit_text_map(semantic_ND: Floats, collab_NC: Floats, weights_N: Floats, ridge: float) -> TextMap:
    """Fit a `TextMap` by weighted ridge regression on trained items; `weights_N` are their interaction counts' trust.

    Each dimension of the semantic vectors is divided by its own spread: in a language model a few dimensions are
    hundreds of times as wide as the rest, and a common ridge would keep these alone. `ridge` is relative to the spread.
    """
    weights = (weights_N / weights_N.sum()).astype(np.float64)
    center, offset = weights @ semantic_ND, weights @ collab_NC
    centered_ND = (semantic_ND - center).astype(np.float64)
    spread_D = np.sqrt(weights @ centered_ND**2)
    spread_D = np.where(spread_D > 1e-9 * (spread_D.max(initial=0.0) or 1.0), spread_D, np.inf)
    weighted_ND = centered_ND / spread_D * np.sqrt(weights)[:, None]
    wanted_NC = (collab_NC - offset) * np.sqrt(weights)[:, None]
    system_DD = weighted_ND.T @ weighted_ND + ridge * np.eye(len(spread_D))
    weight_DC = np.linalg.solve(system_DD, weighted_ND.T @ wanted_NC) / spread_D[:, None]
    return TextMap(center.astype(np.float32), weight_DC.astype(np.float32), offset.astype(np.float32))
