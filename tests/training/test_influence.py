from dataclasses import replace

import numpy as np
import pytest
import torch

from training.config import AlignConfig
from training.examples import Examples, Targets
from training.stages.align import Collab
from training.stages.influence import influence

CONFIG = AlignConfig(factor_decay=3.0, user_bias_decay=5.0, item_bias_decay=2.0)


@pytest.fixture
def targets(examples: Examples) -> Targets:
    """The train rows, one in three counting double."""
    targets = examples.targets("train", 16)
    return replace(targets, weight_B=np.where(np.arange(len(targets)) % 3 == 0, 2.0, 1.0).astype(np.float32))


def refitted(collab: Collab, targets: Targets, user: int, without: int | None = None) -> torch.Tensor:
    """Fit [p, b_u, 1] of one user to its rows, items fixed, with all of them or without one."""
    width = collab.user_vectors_UC.shape[1]
    rows = np.array([row for row in np.flatnonzero(targets.user_B == user) if row != without])
    items_NC = collab.item_vectors_IC.double().numpy()[targets.item_B[rows]]
    roots_N = np.sqrt(targets.weight_B[rows].astype(np.float64))
    decay_F = np.array([CONFIG.factor_decay] * (width - 2) + [CONFIG.user_bias_decay]) * targets.weight_B.mean()
    # Each penalty is a row of its own, which says that the number is 0.
    features = np.vstack([items_NC[:, :-1] * roots_N[:, None], np.diag(np.sqrt(decay_F))])
    wanted = np.concatenate([(targets.label_B[rows] - items_NC[:, -1]) * roots_N, np.zeros(width - 1)])
    return torch.from_numpy(np.append(np.linalg.lstsq(features, wanted, rcond=None)[0], 1.0).astype(np.float32))


def test_what_is_taken_off_leaves_the_fit_without_the_row(collab: Collab, targets: Targets) -> None:
    user = int(np.bincount(targets.user_B).argmax())
    vectors_UC = collab.user_vectors_UC.clone()
    vectors_UC[user] = refitted(collab, targets, user)
    found = influence(vectors_UC, collab.item_vectors_IC, targets, CONFIG)
    for row in np.flatnonzero(targets.user_B == user):
        wanted_C = refitted(collab, targets, user, without=int(row))
        assert float((wanted_C - vectors_UC[user]).norm()) > 1e-4
        torch.testing.assert_close(vectors_UC[user] - found.user_BC[row], wanted_C, rtol=1e-4, atol=1e-5)


def test_users_and_items_are_treated_alike(collab: Collab, targets: Targets) -> None:
    """With the roles and the two bias dimensions exchanged, what was the users' influence is the items'."""

    def exchanged(vectors: torch.Tensor) -> torch.Tensor:
        return torch.cat([vectors[:, :-2], vectors[:, -1:], vectors[:, -2:-1]], dim=1)

    mirrored = replace(
        collab,
        user_vectors_UC=exchanged(collab.item_vectors_IC),
        item_vectors_IC=exchanged(collab.user_vectors_UC),
    )
    swapped = replace(targets, user_B=targets.item_B, item_B=targets.user_B)
    config = CONFIG.model_copy(update={"user_bias_decay": 2.0, "item_bias_decay": 5.0})
    ours = influence(collab.user_vectors_UC, collab.item_vectors_IC, targets, CONFIG)
    theirs = influence(mirrored.user_vectors_UC, mirrored.item_vectors_IC, swapped, config)
    torch.testing.assert_close(ours.item_BC, exchanged(theirs.user_BC))
    torch.testing.assert_close(ours.user_BC, exchanged(theirs.item_BC))


def test_a_label_pulls_the_prediction_of_its_row_its_own_way(collab: Collab, targets: Targets) -> None:
    found = influence(collab.user_vectors_UC, collab.item_vectors_IC, targets, CONFIG)
    users_BC, items_BC = collab.user_vectors_UC[targets.user_B], collab.item_vectors_IC[targets.item_B]
    error_B = torch.from_numpy(targets.label_B) - (users_BC * items_BC).sum(-1)
    for change_B in ((found.user_BC * items_BC).sum(-1), (found.item_BC * users_BC).sum(-1)):
        assert bool((change_B * error_B >= -1e-6).all()) and float(change_B.abs().mean()) > 1e-3


def test_the_constants_inside_the_vectors_stay(collab: Collab, targets: Targets) -> None:
    found = influence(collab.user_vectors_UC, collab.item_vectors_IC, targets, CONFIG)
    assert not found.user_BC[:, -1].any() and not found.item_BC[:, -2].any()


def test_without_penalties_it_is_finite(collab: Collab, targets: Targets) -> None:
    found = influence(
        collab.user_vectors_UC,
        collab.item_vectors_IC,
        targets,
        AlignConfig(factor_decay=0.0, user_bias_decay=0.0, item_bias_decay=0.0),
    )
    assert bool(found.user_BC.isfinite().all()) and bool(found.item_BC.isfinite().all())


def test_rows_are_picked_in_order(collab: Collab, targets: Targets) -> None:
    found = influence(collab.user_vectors_UC, collab.item_vectors_IC, targets, CONFIG)
    some = found.of(np.array([3, 1], np.int32), torch.device("cpu"))
    assert torch.equal(some.user_BC, found.user_BC[[3, 1]]) and torch.equal(some.item_BC, found.item_BC[[3, 1]])
