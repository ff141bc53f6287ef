"""The second half of stage 2: an item's vector is predicted from its text and corrected by its labels.

Matrix factorisation pulls the vector of an item with few labels towards the mean item. Semantic vectors say more than
the mean: a ridge map predicts a vector for every item from its semantic vector. The items' vectors are fitted again,
with the users' vectors fixed and this prediction in the place of the mean. The prediction for an item comes from a map
that was fitted without the item (folds by item); otherwise its own labels would count twice. Then the users are fitted
to the new items, and so on in turn. These are closed forms: they reach the minimum also on small data, where gradient
steps are few. The paper does not have this step.

Shapes: B train rows, N rows of an item, I items, F free dimensions of an item's vector, C = d_C, D = d_L.
"""

import numpy as np
from numpy.typing import NDArray

from models.cold import TextMap, fit_text_map
from training.config import AlignConfig
from training.examples import Int32, Targets

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
FOLDS = 5
LEAST_DECAY = 1e-3  # without any penalty a user of few rows has no one solution; in interactions


def items_under_text_prior(
    users_UC: Floats, items_IC: Floats, semantic_ID: Floats, train: Targets, config: AlignConfig
) -> tuple[Floats, TextMap]:
    """Return every item's vector, `(I, C)`, and the map that gives a vector to an item without labels.

    An item that was never trained gets the map's vector.
    """
    counts_I = np.bincount(train.item_B, minlength=len(items_IC))
    trained_I = counts_I > 0
    # The map is fitted to the items' biases without the shrinkage of matrix factorisation. An item with more labels
    # gets a larger weight.
    wanted_IC = items_IC.copy()
    wanted_IC[:, -1] += _mean_residual(users_UC, items_IC, train)
    trust_I = counts_I / (counts_I + config.item_bias_decay + 1.0)

    def map_without(left_out_I: NDArray[np.bool_]) -> TextMap:
        chosen_I = trained_I & ~left_out_I
        return fit_text_map(semantic_ID[chosen_I], wanted_IC[chosen_I], trust_I[chosen_I], config.ridge)

    text_map = map_without(np.zeros(len(items_IC), bool))
    fitted_IC = text_map(semantic_ID)
    fold_I = np.cumsum(trained_I) % FOLDS
    if trained_I.sum() >= 2 * FOLDS:
        for fold in range(FOLDS):
            own_I = trained_I & (fold_I == fold)
            fitted_IC[own_I] = map_without(own_I)(semantic_ID[own_I])
    factors = items_IC.shape[1] - 2
    _correct(fitted_IC, users_UC, train.item_B, train.user_B, train, [*range(factors), factors + 1],
             [config.factor_decay] * factors + [config.item_bias_decay])  # fmt: skip
    return fitted_IC, text_map


def _mean_residual(users_UC: Floats, items_IC: Floats, train: Targets) -> Doubles:
    """Return the mean label minus the mean prediction of each item's rows, `(I,)`."""
    residual_B = train.label_B - (users_UC[train.user_B] * items_IC[train.item_B]).sum(-1)
    sums, weights = (
        np.bincount(train.item_B, weights=values * train.weight_B, minlength=len(items_IC))
        for values in (residual_B, np.ones(len(train)))
    )
    mean: Doubles = sums / np.maximum(weights, 1e-9)
    return mean


def users_of_labels(users_UC: Floats, items_IC: Floats, train: Targets, config: AlignConfig) -> Floats:
    """Return every user's vector at the minimum of Eq. 6, with the items' vectors fixed, `(U, C)`."""
    fitted_UC = np.zeros_like(users_UC)
    fitted_UC[:, -1] = 1.0
    factors = users_UC.shape[1] - 2
    _correct(fitted_UC, items_IC, train.user_B, train.item_B, train, [*range(factors), factors],
             [config.factor_decay] * factors + [config.user_bias_decay])  # fmt: skip
    return fitted_UC


def _correct(
    own_EC: Floats,
    other_EC: Floats,
    own_B: Int32,
    other_B: Int32,
    train: Targets,
    free: list[int],
    penalty_F: list[float],
) -> None:
    """Move each own vector, in place, to the minimum of Eq. 6; the others are fixed, its old value is the prior mean.

    `free` lists the fitted dimensions: a user's vector is [p, b_u, 1] and an item's [q, 1, b_i].
    """
    penalty_FF = np.diag(np.maximum(np.array(penalty_F), LEAST_DECAY) * train.weight_B.mean())
    order = np.argsort(own_B, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(own_B[order])) + 1):
        own, others_NC = own_B[rows[0]], other_EC[other_B[rows]].astype(np.float64)
        residual_N = train.label_B[rows] - others_NC @ own_EC[own]
        features_NF = others_NC[:, free]
        weighted_FN = features_NF.T * train.weight_B[rows]
        own_EC[own, free] += np.linalg.solve(weighted_FN @ features_NF + penalty_FF, weighted_FN @ residual_N)
