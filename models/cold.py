"""Vectors for what was never trained: a user folded in from a history, an item mapped from its text.

Shapes: H history items, N rows, C = d_C, D = d_L.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class UserPrior:
    """The trained users' Gaussian, and how a liked item is observed under it.

    A history holds positives alone, so observing each as label 1 would make every new user look lenient. Each is
    observed as `target` instead, with variance `noise`: the two are fitted on train users treated as new.
    """

    mean_C: Floats
    covariance_CC: Floats
    target: float
    noise: float

    def fold_in(self, items_HC: Floats) -> Floats:
        """Return the posterior mean of a user who liked these items, `(C,)`; the prior mean for none.

        u = m + S V' (V S V' + noise I)^-1 (target - V m), the form that needs no inverse of S: the constant
        dimension of a user vector has no variance.
        """
        if len(items_HC) == 0:
            return self.mean_C
        gain_CH = self.covariance_CC @ items_HC.T
        system_HH = items_HC @ gain_CH + self.noise * np.eye(len(items_HC), dtype=np.float32)
        residual_H = self.target - items_HC @ self.mean_C
        folded: Floats = (self.mean_C + gain_CH @ np.linalg.solve(system_HH, residual_H)).astype(np.float32)
        return folded


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
