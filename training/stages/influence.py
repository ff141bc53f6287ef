"""What a training row's own label did to its user's and its item's vector, so that stage 3 can train without it.

Stage 2 fits a user's vector to the labels of that user's rows. Shown those very rows with that very vector, stage 3
learns to trust it more than a validation row's deserves. With the other side fixed, a vector is a ridge regression, and
what one row did to it has a closed form: no second training.

Shapes: B train rows, N rows of one user or item, F free dimensions of its vector, C = d_C.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.config import AlignConfig
from training.examples import Int32, Targets
from training.stages.text_prior import LEAST_DECAY

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Influence:
    """To be taken off the trained vectors: what each row's label added to its user's and its item's."""

    user_BC: Tensor
    item_BC: Tensor

    def of(self, rows: Int32, device: torch.device) -> "Influence":
        """Return the influence on some rows, on a device."""
        return Influence(self.user_BC[rows].to(device), self.item_BC[rows].to(device))


def influence(users_UC: Tensor, items_IC: Tensor, targets: Targets, config: AlignConfig) -> Influence:
    """Return the influence of every train row on its user's and its item's vector of stage 2.

    Ridge regression on features X with weights W and penalties L has the system A = X'WX + L; leaving out a row x of
    weight w and residual r moves the solution by A^-1 x w r / (1 - w x'A^-1 x) (Cook, 1977).
    """
    users_BC = users_UC.numpy()[targets.user_B].astype(np.float64)
    items_BC = items_IC.numpy()[targets.item_B].astype(np.float64)
    residual_B = targets.label_B - (users_BC * items_BC).sum(-1)
    b_u, b_i = users_BC.shape[1] - 2, items_BC.shape[1] - 1

    def moved(owner_B: Int32, other_BC: Doubles, bias: int, decay: float) -> Tensor:
        # A user's vector ends in b_u, 1 and an item's in 1, b_i: the constants were not fitted.
        free = [*range(b_u), bias]
        decay_F = np.maximum([config.factor_decay] * b_u + [decay], LEAST_DECAY) * targets.weight_B.mean()
        moved_BC = np.zeros(other_BC.shape, np.float32)
        moved_BC[:, free] = _left_out(owner_B, other_BC[:, free], residual_B, targets.weight_B, decay_F)
        return torch.from_numpy(moved_BC)

    return Influence(
        moved(targets.user_B, items_BC, b_u, config.user_bias_decay),
        moved(targets.item_B, users_BC, b_i, config.item_bias_decay),
    )


def _left_out(
    owner_B: Int32, features_BF: Doubles, residual_B: Doubles, weight_B: NDArray[np.float32], decay_F: Doubles
) -> Doubles:
    """Return, for each row, its owner's solution with all rows minus the one without the row, `(B, F)`."""
    moved_BF = np.zeros_like(features_BF)
    order = np.argsort(owner_B, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(owner_B[order])) + 1):
        features_NF, weight_N = features_BF[rows], weight_B[rows]
        system_FF = features_NF.T @ (features_NF * weight_N[:, None]) + np.diag(decay_F)
        gain_NF = weight_N[:, None] * np.linalg.solve(system_FF, features_NF.T).T
        leverage_N = (gain_NF * features_NF).sum(-1)
        moved_BF[rows] = gain_NF * (residual_B[rows] / (1 - leverage_N))[:, None]
    return moved_BF
