import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from models.cold import UserPrior
from models.projection import CollabProjection
from models.template import Template, TemplateConfig
from models.tokens import TextEncoder
from tests.tiny import tiny_tokenizer
from tests.training.micro import MICRO
from training import start
from training.config import Config
from training.data.dataset import Dataset
from training.data.history import build_histories
from training.data.synthetic import SyntheticConfig, draw_tables, plant
from training.examples import Examples, Targets
from training.metrics import auc
from training.run import Run, read_tensors
from training.stages.align import (
    OUTCOME_CAUTION,
    PRIOR_NUMBERS,
    Collab,
    align,
    align_loss,
    errors_without_own_label,
    fit_prior,
    with_drift,
    with_outcomes,
)
from training.stages.project import collab_predictions

Runs = Callable[..., Run]


def examples_of(tables: dict[str, pl.DataFrame]) -> Examples:
    splits = {
        name: tables[name].with_columns(weight=pl.lit(1.0, pl.Float32)) for name in ("train", "valid") if name in tables
    }
    dataset = Dataset(tables["items"], splits)
    return Examples(dataset, build_histories(dataset), Template(TemplateConfig(), TextEncoder(tiny_tokenizer())))


def test_align_loss_is_infonce_of_each_items_projection_against_every_semantic_vector() -> None:
    torch.manual_seed(0)
    projected_ND, semantic_ND = torch.randn(5, 7), torch.randn(5, 7) * 3

    def similarity(i: int, j: int) -> float:
        """exp(cos / tau), of item i's projection with item j's semantic vector."""
        ours, theirs = projected_ND[i].double(), semantic_ND[j].double()
        return math.exp(float(ours @ theirs / (ours.norm() * theirs.norm())) / 0.2)

    by_hand = [-math.log(similarity(i, i) / sum(similarity(i, j) for j in range(5))) for i in range(5)]
    assert float(align_loss(projected_ND, semantic_ND, 0.2)) == pytest.approx(np.mean(by_hand), rel=1e-5)
    # Roles are not alike: the printed equation's other readings would give this.
    assert float(align_loss(semantic_ND, projected_ND, 0.2)) != pytest.approx(np.mean(by_hand), rel=1e-3)


def test_align_loss_falls_to_zero_when_every_item_finds_its_own() -> None:
    assert float(align_loss(torch.eye(6), torch.eye(6) * 4, 0.01)) < 1e-6
    assert float(align_loss(torch.eye(6).flip(0), torch.eye(6), 0.01)) > 50


@pytest.fixture(scope="module")
def planted() -> SyntheticConfig:
    return SyntheticConfig(users=200, items=150, train_rows=6000, valid_rows=1500, test_rows=10)


@pytest.fixture(scope="module")
def learned(
    planted: SyntheticConfig, new_run: Runs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Examples, Collab]:
    """Stage 2 on planted data, with semantic vectors that tell the genre as a language model's would."""
    examples = examples_of(draw_tables(planted))
    genres_IG = torch.from_numpy(plant(planted).trait_IT).float()
    noise_IG = torch.randn(genres_IG.shape, generator=torch.Generator().manual_seed(0))
    schedule = {"epochs": 15, "learning_rate": 0.01, "batch_targets": 512, "evaluations_per_epoch": 1}
    run = new_run(tmp_path_factory.mktemp("align"), align={"d_collab": 16, "d_hidden": 16, "schedule": schedule})
    return examples, align(run, examples, 2 * genres_IG + 0.2 * noise_IG)


def test_factorisation_finds_the_planted_taste_beyond_popularity(learned: tuple[Examples, Collab]) -> None:
    examples, collab = learned
    train, valid = examples.targets("train", 1), examples.targets("valid", 1)
    warm_B = collab.user_trained_U.numpy()[valid.user_B] & collab.item_trained_I.numpy()[valid.item_B]
    size = len(collab.item_trained_I)
    likes_I = np.bincount(train.item_B, train.label_B, minlength=size) + 1
    popularity_I = likes_I / (np.bincount(train.item_B, minlength=size) + 2)
    ours = auc(collab_predictions(examples, collab, valid)[warm_B], valid.label_B[warm_B])
    popular = auc(popularity_I[valid.item_B][warm_B], valid.label_B[warm_B])
    assert ours is not None and popular is not None
    assert ours > popular + 0.04


def test_an_item_never_trained_is_told_by_its_text(learned: tuple[Examples, Collab]) -> None:
    examples, collab = learned
    valid = examples.targets("valid", 1)
    cold_B = collab.user_trained_U.numpy()[valid.user_B] & ~collab.item_trained_I.numpy()[valid.item_B]
    assert cold_B.sum() > 200
    area = auc(collab_predictions(examples, collab, valid)[cold_B], valid.label_B[cold_B])
    assert area is not None and area > 0.58


def test_rows_without_training_data_hold_the_prior_mean_and_the_map_from_text(
    collab: Collab, semantic_vectors: torch.Tensor
) -> None:
    user_cold_U, item_cold_I = ~collab.user_trained_U, ~collab.item_trained_I
    assert user_cold_U.any() and item_cold_I.any()
    trained_mean_C = collab.user_vectors_UC[collab.user_trained_U].mean(0)
    torch.testing.assert_close(collab.user_vectors_UC[user_cold_U], trained_mean_C.expand(int(user_cold_U.sum()), -1))
    mapped_IC = torch.from_numpy(collab.text_map(semantic_vectors.numpy()))
    torch.testing.assert_close(collab.item_vectors_IC[item_cold_I], mapped_IC[item_cold_I], rtol=0, atol=1e-6)
    assert not torch.isclose(collab.item_vectors_IC[~item_cold_I], mapped_IC[~item_cold_I]).all(dim=1).any()


def test_trained_means_a_row_in_train_whatever_its_label(collab: Collab, examples: Examples) -> None:
    train = examples.dataset.splits["train"]
    for trained, ids, column in (
        (collab.user_trained_U, examples.histories.user_ids, "user_id"),
        (collab.item_trained_I, examples.dataset.items["item_id"], "item_id"),
    ):
        assert trained.tolist() == ids.is_in(train[column].unique().to_list()).to_list()


def test_the_prior_is_the_trained_users_gaussian(collab: Collab) -> None:
    users_UC = collab.user_vectors_UC[collab.user_trained_U].numpy().astype(np.float64)
    np.testing.assert_allclose(collab.prior.mean_C, users_UC.mean(0), atol=1e-6)
    np.testing.assert_allclose(collab.prior.covariance_CC, np.cov(users_UC.T), atol=1e-6)


def test_semantic_deltas_are_zero_without_training_data_and_only_there(collab: Collab) -> None:
    moved_I = collab.semantic_delta_ID.abs().sum(1) > 0
    assert moved_I.tolist() == collab.item_trained_I.tolist()


def test_biases_stand_inside_the_vectors(collab: Collab) -> None:
    assert (collab.user_vectors_UC[collab.user_trained_U, -1] == 1).all()
    assert (collab.item_vectors_IC[collab.item_trained_I, -2] == 1).all()
    assert collab.item_vectors_IC[collab.item_trained_I, -1].std() > 0


def test_alignment_pulls_projections_to_their_own_semantic_vectors(
    new_run: Runs, examples: Examples, semantic_vectors: torch.Tensor, tmp_path: Path
) -> None:
    """After the last step; which step is kept is for the AUC to say."""
    losses = []
    for strength in (0.0, 1.0):
        schedule = {"epochs": 20, "learning_rate": 0.01, "batch_targets": 256, "patience": 99}
        config = {"d_collab": 8, "d_hidden": 16, "alignment": strength, "schedule": schedule}
        trained_I = align(new_run(tmp_path / str(strength), align=config), examples, semantic_vectors).item_trained_I
        last, _ = read_tensors(tmp_path / str(strength) / "align.safetensors")
        bias_I1 = (last["now/factors.item_bias"] + last["now/factors.mean"])[:, None]
        items_IC = torch.cat([last["now/factors.item_factors"], torch.ones_like(bias_I1), bias_I1], dim=1)
        projection = CollabProjection(8, 16, semantic_vectors.shape[1])
        weights = {name: last[f"now/projection.{name}"] for name, _ in projection.named_parameters()}
        projection.load_state_dict(weights, strict=False)
        with torch.no_grad():
            projected_ID = projection(items_IC[trained_I])
        losses.append(float(align_loss(projected_ID, (semantic_vectors + last["now/delta"])[trained_I], 0.1)))
    assert losses[1] < losses[0] - 0.5


def test_a_finished_stage_is_taken_as_it_is(
    new_run: Runs, examples: Examples, semantic_vectors: torch.Tensor, tmp_path: Path
) -> None:
    first = align(new_run(tmp_path), examples, semantic_vectors)
    written = (tmp_path / "align_result.safetensors").read_bytes()
    again = align(new_run(tmp_path), examples, semantic_vectors)
    assert (tmp_path / "align_result.safetensors").read_bytes() == written
    assert torch.equal(first.item_vectors_IC, again.item_vectors_IC)
    for name in PRIOR_NUMBERS:
        assert getattr(first.prior, name) == getattr(again.prior, name)


def test_two_runs_are_bit_equal_with_two_threads(
    examples: Examples, semantic_vectors: torch.Tensor, tmp_path: Path
) -> None:
    schedule = {"epochs": 3, "batch_targets": 1024, "evaluations_per_epoch": 1}
    config = Config.changed_by({"align": {"d_collab": 256, "schedule": schedule}})
    torch.set_num_threads(2)
    try:
        written = []
        for name in ("first", "second", "third"):
            align(start.new_run(tmp_path / name, config), examples, semantic_vectors)
            written.append((tmp_path / name / "align_result.safetensors").read_bytes())
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)
    assert written[0] == written[1] == written[2]


def two_kinds(*, taste: bool) -> tuple[Examples, np.ndarray, np.ndarray]:
    """Users of two kinds over items of two kinds; labels follow taste, or a coin."""
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 40, 1200), rng.integers(0, 30, 1200)
    label = (user % 2 == item % 2) if taste else rng.random(1200) < 0.5
    tables = {
        "items": pl.DataFrame({"item_id": [f"i{row}" for row in range(30)], "title": [f"T{row}" for row in range(30)]}),
        "train": pl.DataFrame(
            {
                "user_id": [f"u{one}" for one in user],
                "item_id": [f"i{one}" for one in item],
                "label": label.astype(np.int8),
                "timestamp": np.arange(1200),
            }
        ),
    }
    examples = examples_of(tables)
    kind_U = np.array([int(one[1:]) % 2 for one in examples.histories.user_ids])
    side_I = np.arange(30) % 2
    # [p, b_u, 1] . [q, 1, b_i] = 0.5 +- 0.5, and a little spread that a Gaussian needs.
    users_UC = np.stack([kind_U - 0.5, rng.normal(0, 0.05, 40), np.ones(40)], 1).astype(np.float32)
    items_IC = np.stack([2 * (side_I - 0.5), np.ones(30), np.full(30, 0.5)], 1).astype(np.float32)
    return examples, users_UC, items_IC


def squared_error(examples: Examples, users_UC: np.ndarray, items_IC: np.ndarray, target: float, noise: float) -> float:
    train = examples.targets("train", 1)
    everyone = np.ones(len(users_UC), bool)
    prior = fit_prior(examples, train, users_UC, items_IC, everyone, targets=(target,), noises=(noise,))
    errors = [
        float(train.label_B[row]) - float(prior.fold_in(items_IC[examples.window(train, row)]) @ items_IC[item])
        for row, item in enumerate(train.item_B)
    ]
    return float(np.mean(np.square(errors)))


@pytest.mark.parametrize("taste", [True, False])
def test_the_fold_in_is_fitted_by_what_predicts_train_rows_best(taste: bool) -> None:
    examples, users_UC, items_IC = two_kinds(taste=taste)
    train, everyone = examples.targets("train", 1), np.ones(len(users_UC), bool)
    fitted = fit_prior(examples, train, users_UC, items_IC, everyone)
    grid = {
        (target, noise): squared_error(examples, users_UC, items_IC, target, noise)
        for target in (0.5, 0.6, 0.7, 0.85, 1.0)
        for noise in (0.3, 1.0, 3.0, 10.0)
    }
    assert grid[fitted.target, fitted.noise] == pytest.approx(min(grid.values()), abs=1e-7)


def test_with_one_train_user_vectors_are_finite_and_stay_where_they_are() -> None:
    examples, users_UC, items_IC = two_kinds(taste=True)
    one_user = np.arange(len(users_UC)) == 0
    prior = fit_prior(examples, examples.targets("train", 1), users_UC, items_IC, one_user)
    assert np.array_equal(prior.fold_in(items_IC[:3]), users_UC[0])
    labels_H = np.array([1, 0, 1], np.float32)
    updated = prior.updated(users_UC[0], 5, items_IC[:3], labels_H, np.arange(3.0), 9.0, items_IC[:0])
    assert np.array_equal(updated, users_UC[0])


def test_a_history_that_tells_taste_is_believed_and_one_that_tells_nothing_is_not() -> None:
    fitted = {}
    for taste in (True, False):
        examples, users_UC, items_IC = two_kinds(taste=taste)
        everyone = np.ones(len(users_UC), bool)
        fitted[taste] = fit_prior(examples, examples.targets("train", 1), users_UC, items_IC, everyone)
    assert (fitted[True].target, fitted[True].noise) == (1.0, 0.3)
    assert fitted[False].target == 0.5


def test_after_as_many_outcomes_as_the_strength_half_of_a_predictions_variance_is_left() -> None:
    rng = np.random.default_rng(0)
    width, noise = 4, 2.0
    covariance = np.diag([0.1] * width + [0.0]).astype(np.float32)
    items = np.concatenate([rng.normal(0, 0.5, (2000, width)), np.ones((2000, 1))], 1).astype(np.float32)
    errors = rng.normal(0, noise**0.5, 20_000)
    nobody = UserPrior(np.zeros(width + 1, np.float32), covariance, 0.7, 0.3, 1.0, 1.0)
    fitted = with_outcomes(nobody, items, errors, np.ones(20_000, np.float32))
    assert fitted.outcome_noise == pytest.approx(noise, rel=0.03)
    seen = items[: round(fitted.strength)]
    gain = covariance @ seen.T @ np.linalg.inv(seen @ covariance @ seen.T + noise * np.eye(len(seen)))
    left = covariance - gain @ seen @ covariance
    shares = [np.einsum("ic,cd,id->", items, one, items) for one in (left, covariance)]
    assert shares[0] / shares[1] == pytest.approx(0.5, abs=0.07)


def test_rows_that_count_more_weigh_more_in_the_noise_and_users_who_do_not_differ_are_no_error() -> None:
    nobody = UserPrior(np.zeros(2, np.float32), np.zeros((2, 2), np.float32), 0.7, 0.3, 1.0, 1.0)
    items = np.ones((3, 2), np.float32)
    fitted = with_outcomes(nobody, items, np.array([0.1, 0.4]), np.array([3.0, 1.0], np.float32))
    assert fitted.outcome_noise == pytest.approx((3 * 0.01 + 0.16) / 4)
    exact = with_outcomes(nobody, items, np.zeros(2), np.ones(2, np.float32))
    assert exact.outcome_noise > 0 and exact.strength > 0


def test_predictions_without_any_error_leave_a_trained_user_some_strength() -> None:
    prior = UserPrior(np.zeros(2, np.float32), np.eye(2, dtype=np.float32), 0.5, 0.5, 1.0, 1.0)
    items = np.eye(2, dtype=np.float32)
    fitted = with_outcomes(prior, items, np.zeros(2), np.ones(2, np.float32))
    assert fitted.strength > 0
    labels_H = np.ones(2, np.float32)
    assert np.isfinite(fitted.updated(prior.mean_C, 0, items, labels_H, np.zeros(2), 1.0, items[:0])).all()


def test_the_noise_of_an_outcome_is_of_predictions_that_lack_its_label(collab: Collab, examples: Examples) -> None:
    train, users_UC, items_IC = examples.targets("train", 1), collab.user_vectors_UC, collab.item_vectors_IC
    plain_B = train.label_B - (users_UC[train.user_B] * items_IC[train.item_B]).sum(-1).numpy()
    errors_B = errors_without_own_label(users_UC, items_IC, train, Config.changed_by(MICRO).align)
    assert (np.abs(errors_B) > np.abs(plain_B)).mean() > 0.95
    noise = np.average(errors_B**2, weights=train.weight_B)
    assert collab.prior.outcome_noise == pytest.approx(OUTCOME_CAUTION * noise, abs=1e-5)


@pytest.mark.parametrize(("variance", "seconds"), [(0.02, 1800.0), (0.0, 1.0)])
def test_a_planted_drift_is_found_and_none_where_there_is_none(variance: float, seconds: float) -> None:
    rng = np.random.default_rng(0)
    users, rows = 200, 60
    items_IC = np.concatenate([rng.normal(0, 0.3, (50, 2)), np.ones((50, 1)), rng.normal(0, 0.1, (50, 1))], 1)
    prior = UserPrior(
        np.array([0, 0, 0.5, 1], np.float32), np.diag([0.05, 0.05, 0.03, 0]).astype(np.float32), 0.7, 0.3, 0.2, 10.0
    )
    user_B, item_B = np.repeat(np.arange(users), rows), rng.integers(0, 50, users * rows)
    times_B = np.cumsum(rng.exponential(120.0, users * rows) + (rng.random(users * rows) < 0.1) * 50_000)
    vectors_UC = rng.multivariate_normal(prior.mean_C, prior.covariance_CC, users)
    label_B = (vectors_UC[user_B] * items_IC[item_B]).sum(-1) + rng.normal(0, 0.2**0.5, users * rows)
    for user in range(users if variance else 0):
        own = slice(user * rows, (user + 1) * rows)
        apart_NN = np.abs(np.subtract.outer(times_B[own], times_B[own]))
        label_B[own] += rng.multivariate_normal(np.zeros(rows), variance * np.exp(-apart_NN / seconds))
    weight_B, nothing = np.ones(users * rows, np.float32), np.zeros(0, np.int32)
    train = Targets("train", user_B, item_B, label_B, weight_B, nothing, nothing, [])
    fitted = with_drift(prior, items_IC.astype(np.float32), train, times_B, seed=0)
    assert (fitted.drift_variance, fitted.drift_seconds) == (variance, seconds)
