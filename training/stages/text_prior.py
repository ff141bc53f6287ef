"""Stage 2's last step: an item's vector is what its text predicts, corrected by its labels.

Matrix factorisation pulls the vector of an item with few labels towards the mean item. A language model knows more
than the mean: a ridge map from semantic vectors predicts a vector for every item, and the items' vectors are fitted
again, with the users' fixed and that prediction in the mean's place. The prediction for an item comes from a map fitted
without it (folds by item); otherwise its own labels would count twice. Not in the paper.

Shapes: B train rows, N rows of an item, I items, F free dimensions of an item's vector, C = d_C, D = d_L.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from models.cold import TextMap, fit_text_map
from training.config import AlignConfig
from training.examples import Int32, Targets

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
FOLDS = 5


def items_under_text_prior(
    users_UC: Floats, items_IC: Floats, semantic_ID: Floats, train: Targets, config: AlignConfig
) -> tuple[Floats, TextMap]:
    """Return every item's vector, `(I, C)`, and the map that gives a vector to an item without labels.

    An item that was never trained gets the map's vector.
    """
    counts_I = np.bincount(train.item_B, minlength=len(items_IC))
    trained_I = counts_I > 0
    # A prediction is fitted to the items' own biases, before matrix factorisation shrinks them, each trusted as far as
    # it has labels.
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
    _correct(fitted_IC, users_UC, train, config)
    return fitted_IC, text_map


def rows_by_item(train: Targets) -> Iterator[tuple[int, Int32]]:
    """Yield each item that has train rows, and those rows."""
    order = np.argsort(train.item_B, kind="stable").astype(np.int32)
    for rows in np.split(order, np.flatnonzero(np.diff(train.item_B[order])) + 1):
        yield int(train.item_B[rows[0]]), rows


def _mean_residual(users_UC: Floats, items_IC: Floats, train: Targets) -> Doubles:
    """Return what the mean label of each item's rows is above the prediction, `(I,)`."""
    residual_B = train.label_B - (users_UC[train.user_B] * items_IC[train.item_B]).sum(-1)
    sums, weights = (
        np.bincount(train.item_B, weights=values * train.weight_B, minlength=len(items_IC))
        for values in (residual_B, np.ones(len(train)))
    )
    mean: Doubles = sums / np.maximum(weights, 1e-9)
    return mean


def _correct(items_IC: Floats, users_UC: Floats, train: Targets, config: AlignConfig) -> None:
    """Move every item's vector, in place, to the minimum of Eq. 6 with its present value as the prior's mean."""
    factors = items_IC.shape[1] - 2
    free = [*range(factors), factors + 1]  # an item's vector is [q, 1, b_i]
    penalty_FF = np.diag([config.factor_decay] * factors + [config.item_bias_decay]) * train.weight_B.mean()
    penalty_FF = np.maximum(penalty_FF, 1e-3 * np.eye(len(free)))
    for item, rows in rows_by_item(train):
        users_NC = users_UC[train.user_B[rows]].astype(np.float64)
        residual_N = train.label_B[rows] - users_NC @ items_IC[item]
        features_NF = np.concatenate([users_NC[:, :factors], np.ones((len(rows), 1))], axis=1)
        weighted_FN = features_NF.T * train.weight_B[rows]
        items_IC[item, free] += np.linalg.solve(weighted_FN @ features_NF + penalty_FF, weighted_FN @ residual_N)
