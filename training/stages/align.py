"""Stage 2: matrix factorisation, aligned with the language model's item vectors (section 4.2, Eqs. 6-9).

Table 1: language model and LoRA frozen; collab vectors, semantic vectors and the collab projection trained. Eq. 6's
sign and Eq. 8's missing logarithm are the paper's misprints: a squared error is minimised as it is, and InfoNCE is a
cross-entropy. Eq. 8's denominator pairs the item's projection with every other item's semantic vector; the paper's
prints both indices alike. It runs in one process: it takes seconds where the other stages take minutes.

Shapes: B pairs, N items of a batch, U users, I items, C = d_C, D = d_L.
"""

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from torch import Tensor, nn

from models.cold import TextMap, UserPrior
from models.collab import MatrixFactorization
from models.projection import CollabProjection
from training.config import AlignConfig
from training.examples import Examples, Targets
from training.loop import StageLoop, derived_seed
from training.prediction import figures, worth
from training.run import Run, read_tensors, write_tensors
from training.stages.influence import influence
from training.stages.text_prior import items_under_text_prior, users_of_labels

PRIOR_NUMBERS = ("target", "noise", "outcome_noise", "strength", "drift_variance", "drift_seconds")
LEAST_NOISE = 1e-3  # least noise of an outcome: with zero noise the system in `UserPrior` can be singular
# How much larger the bundle's noise of an outcome is. With the fitted noise, each outcome moves a user's bias so far
# that scores of one user's items at different moments compare badly: AUC +0.002, UAUC -0.007 (MovieLens-1M, valid).
OUTCOME_CAUTION = 2.0
DRIFT_VARIANCES = (0.0025, 0.005, 0.01, 0.02, 0.04)
DRIFT_SECONDS = (300.0, 1800.0, 14_400.0, 86_400.0, 604_800.0)
DRIFT_USERS, DRIFT_ROWS = 300, 100  # the drift is fitted on this many users, and on the newest rows of each


@dataclass(frozen=True)
class Collab:
    """What stage 2 leaves: vectors of the trained, ways to make vectors for the rest, and the projection."""

    user_vectors_UC: Tensor  # rows without training data hold the prior mean
    item_vectors_IC: Tensor  # rows without training data are mapped from text
    semantic_ID: Tensor  # the distilled vectors, frozen
    semantic_delta_ID: Tensor  # what alignment taught them; zero without training data
    user_trained_U: Tensor
    item_trained_I: Tensor
    prior: UserPrior
    text_map: TextMap
    projection: CollabProjection


def align(run: Run, examples: Examples, semantic_ID: Tensor) -> Collab:
    """Train MF and alignment; finished earlier, the result is taken as it is."""
    path = run.folder / "align_result.safetensors"
    if run.is_main and not path.exists():
        tensors, state = _train(run, examples, semantic_ID)
        write_tensors(path, tensors, state)
    run.accelerator.wait_for_everyone()
    return _result(*read_tensors(path), run.config.align, semantic_ID)


def align_loss(projected_ND: Tensor, semantic_ND: Tensor, temperature: float) -> Tensor:
    """InfoNCE (Eq. 8): each item's projection must find its own semantic vector among those of the batch."""
    cosines_NN = nn.functional.normalize(projected_ND, dim=-1) @ nn.functional.normalize(semantic_ND, dim=-1).T
    own = torch.arange(len(cosines_NN), device=cosines_NN.device)
    return nn.functional.cross_entropy(cosines_NN / temperature, own)


def _train(run: Run, examples: Examples, semantic_ID: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    config = run.config.align
    train, valid = examples.targets("train", 1), examples.targets("valid", 1)
    users, items, labels, weights = (
        torch.from_numpy(one) for one in (train.user_B.astype(np.int64), train.item_B.astype(np.int64), train.label_B,
                                          train.weight_B)
    )  # fmt: skip
    n_users, n_items = len(examples.histories.user_ids), len(semantic_ID)
    seen_U, seen_I = torch.bincount(users, minlength=n_users) > 0, torch.bincount(items, minlength=n_items) > 0
    torch.manual_seed(derived_seed(run.config.seed, "align"))
    mean = float((labels * weights).sum() / weights.sum())
    factors = MatrixFactorization(n_users, n_items, config.d_collab, mean=mean, std=config.init_std)
    projection = CollabProjection(config.d_collab, config.d_hidden, semantic_ID.shape[1])
    delta_ID = nn.Parameter(torch.zeros_like(semantic_ID))

    def evaluate() -> dict[str, float | None]:
        return figures(_predict(factors, seen_U, seen_I, valid), valid)

    def plan(rng: np.random.Generator) -> list[Tensor]:
        return list(torch.from_numpy(rng.permutation(len(labels))).split(config.schedule.batch_targets))

    loop = StageLoop(
        run, "align", _rates(factors, projection, delta_ID, config), config.schedule, plan, evaluate, serial=True
    )
    if not loop.restore():
        for rows in loop.steps():
            errors = labels[rows] - factors(users[rows], items[rows])
            collab = (weights[rows] * errors**2).sum() / weights[rows].sum()  # Eq. 6
            chosen = items[rows].unique()
            aligned = align_loss(
                projection(factors.item_vectors(chosen)), semantic_ID[chosen] + delta_ID[chosen], config.temperature
            )
            decay = _decay(factors, config) / len(labels)
            loop.backward(collab + config.alignment * aligned + decay)  # Eq. 9
    loop.keep_best()
    tensors, state = _finish(run, examples, train, factors, projection, semantic_ID, delta_ID, seen_U, seen_I)
    # Matrix factorisation alone, without the text's prior: the report compares both.
    return tensors | {"valid_mf": torch.from_numpy(_predict(factors, seen_U, seen_I, valid))}, state


def _rates(
    factors: MatrixFactorization, projection: CollabProjection, delta_ID: nn.Parameter, config: AlignConfig
) -> list[tuple[dict[str, nn.Parameter], float, float]]:
    named = dict(factors.named_parameters())
    biases = {f"factors.{name}": one for name, one in named.items() if "factors" not in name}
    tables = {f"factors.{name}": one for name, one in named.items() if "factors" in name}
    projections = {f"projection.{name}": one for name, one in projection.named_parameters()}
    return [
        (tables, 1.0, 0.0),
        (biases, config.bias_rate, 0.0),
        (projections, 1.0, 0.0),
        ({"delta": delta_ID}, config.semantic_rate, 0.0),
    ]


def _decay(factors: MatrixFactorization, config: AlignConfig) -> Tensor:
    """L2 over whole tables, in units of one interaction: a bias decay of 12 is a prior of twelve interactions."""
    return (
        config.user_bias_decay * factors.user_bias.square().sum()
        + config.item_bias_decay * factors.item_bias.square().sum()
        + config.factor_decay * (factors.user_factors.square().sum() + factors.item_factors.square().sum())
    )


@torch.no_grad()
def _predict(factors: MatrixFactorization, seen_U: Tensor, seen_I: Tensor, targets: Targets) -> np.ndarray:
    """Return MF's predictions; who or what was never trained takes the mean of the trained."""
    users_UC, items_IC = factors.user_vectors(), factors.item_vectors()
    users_UC[~seen_U] = users_UC[seen_U].mean(0)
    items_IC[~seen_I] = items_IC[seen_I].mean(0)
    predicted: np.ndarray = (users_UC[targets.user_B] * items_IC[targets.item_B]).sum(-1).double().numpy()
    return predicted


@torch.no_grad()
def _finish(
    run: Run,
    examples: Examples,
    train: Targets,
    factors: MatrixFactorization,
    projection: CollabProjection,
    semantic_ID: Tensor,
    delta_ID: Tensor,
    seen_U: Tensor,
    seen_I: Tensor,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Fit the ways to make vectors for what was never trained, and fill the tables' cold rows with them."""
    fitted_UC, fitted_IC, text_map = _in_turn(run, examples, train, factors, semantic_ID.numpy(), seen_U.numpy())
    users_UC, items_IC = torch.from_numpy(fitted_UC), torch.from_numpy(fitted_IC)
    errors_B = errors_without_own_label(users_UC, items_IC, train, run.config.align)
    prior = with_outcomes(
        fit_prior(examples, train, users_UC.numpy(), items_IC.numpy(), seen_U.numpy()),
        items_IC[seen_I].numpy(),
        errors_B,
        train.weight_B,
    )
    times_B = examples.dataset.splits["train"]["timestamp"].cast(pl.Float64).to_numpy()
    prior = with_drift(prior, items_IC.numpy(), train, times_B, derived_seed(run.config.seed, "drift"))
    prior = replace(prior, outcome_noise=OUTCOME_CAUTION * prior.outcome_noise)
    users_UC[~seen_U] = torch.from_numpy(prior.mean_C)
    tensors = {
        "user_vectors": users_UC,
        "item_vectors": items_IC,
        "semantic_delta": delta_ID * seen_I[:, None],
        "user_trained": seen_U,
        "item_trained": seen_I,
        "prior_mean": torch.from_numpy(prior.mean_C),
        "prior_covariance": torch.from_numpy(prior.covariance_CC),
        "map_center": torch.from_numpy(text_map.center_D),
        "map_weight": torch.from_numpy(text_map.weight_DC),
        "map_offset": torch.from_numpy(text_map.offset_C),
        **{f"projection.{name}": one for name, one in projection.state_dict().items()},
    }
    return tensors, {name: getattr(prior, name) for name in PRIOR_NUMBERS}


def _in_turn(
    run: Run,
    examples: Examples,
    train: Targets,
    factors: MatrixFactorization,
    semantic_ID: np.ndarray,
    seen_U: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, TextMap]:
    """Fit items (with their text's prior) and users in turn; return the vectors of the best valid AUC and the map."""
    config, valid = run.config.align, examples.targets("valid", 1)
    users_UC, items_IC = factors.user_vectors().numpy(), factors.item_vectors().numpy()
    reached: list[tuple[float, np.ndarray, np.ndarray, TextMap]] = []
    for turn in range(config.turns):
        if turn:
            users_UC = users_of_labels(users_UC, items_IC, train, config)
        items_IC, text_map = items_under_text_prior(users_UC, items_IC, semantic_ID, train, config)
        of_valid_BC = np.where(seen_U[valid.user_B][:, None], users_UC[valid.user_B], users_UC[seen_U].mean(0))
        found = figures((of_valid_BC * items_IC[valid.item_B]).sum(-1).astype(np.float64), valid)
        reached.append((worth(found), users_UC, items_IC, text_map))
        area = "undefined" if found["auc"] is None else f"{found['auc']:.4f}"
        run.say(f"align: users and items in turn, {turn + 1} of {config.turns}: valid auc {area}")
    return max(reached, key=lambda one: one[0])[1:]


def fit_prior(
    examples: Examples,
    train: Targets,
    users_UC: np.ndarray,
    items_IC: np.ndarray,
    trained_U: np.ndarray,
    *,
    targets: tuple[float, ...] = (0.5, 0.6, 0.7, 0.85, 1.0),
    noises: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0),
    max_rows: int = 20_000,
) -> UserPrior:
    """Fit the Gaussian of trained users, and the target and noise of a liked item, by folding train users in as if new.

    Each sampled train row is predicted from its own history alone; the pair of target and noise with the least squared
    error wins. `outcome_noise` and `strength` are placeholders: `with_outcomes` fits them.
    """
    mean_C = users_UC[trained_U].mean(0).astype(np.float32)
    # The covariance of one user is not defined. With zero no vector moves; with NaN no score would be finite.
    covariance_CC = np.cov(users_UC[trained_U].T, ddof=int(trained_U.sum() > 1)).astype(np.float32)
    rows = np.unique(np.linspace(0, len(train) - 1, min(max_rows, len(train))).astype(int))
    windows = [items_IC[examples.window(train, row)] for row in rows]
    best: tuple[float, UserPrior] | None = None
    for target in targets:
        for noise in noises:
            prior = UserPrior(mean_C, covariance_CC, target, noise, outcome_noise=noise, strength=1.0)
            folded_BC = np.stack([prior.fold_in(window) for window in windows])
            errors = train.label_B[rows] - (folded_BC * items_IC[train.item_B[rows]]).sum(-1)
            error = float(np.average(errors**2, weights=train.weight_B[rows]))
            if best is None or error < best[0]:
                best = (error, prior)
    assert best is not None
    return best[1]


def errors_without_own_label(
    users_UC: Tensor, items_IC: Tensor, train: Targets, config: AlignConfig
) -> NDArray[np.float64]:
    """Return each train label minus stage 2's prediction from vectors fitted without this label, `(B,)`."""
    own_label = influence(users_UC, items_IC, train, config)
    users_BC, items_BC = users_UC[train.user_B] - own_label.user_BC, items_IC[train.item_B] - own_label.item_BC
    errors_B: NDArray[np.float64] = train.label_B.astype(np.float64) - (users_BC * items_BC).sum(-1).double().numpy()
    return errors_B


def with_outcomes(
    prior: UserPrior, items_IC: np.ndarray, errors_B: NDArray[np.float64], weight_B: np.ndarray
) -> UserPrior:
    """Return the prior with the noise of an outcome and the strength of a trained vector.

    `items_IC` are the trained items' vectors; `errors_B` are the errors of `errors_without_own_label`; their weighted
    mean square is the noise e. Under the covariance S, the variance of a prediction has the mean v = tr(M), M = S C,
    where C is the second moment of the items. The variance lies in about d = tr(M)^2 / tr(M^2) dimensions. n outcomes
    leave the share s / (s + n) of it, with s = d e / v (exact if the d dimensions have equal variance).
    """
    noise = max(float(np.average(errors_B**2, weights=weight_B)), LEAST_NOISE)
    items = items_IC.astype(np.float64)
    moved_CC = prior.covariance_CC.astype(np.float64) @ (items.T @ items / len(items))
    spread = float(np.trace(moved_CC))
    # If users do not differ, the covariance is zero and no outcome changes a vector: any strength is right.
    dimensions = spread**2 / np.trace(moved_CC @ moved_CC) if spread > 0 else 1.0
    strength = dimensions * noise / spread if spread > 0 else 1.0
    return replace(prior, outcome_noise=round(noise, 6), strength=round(float(strength), 6))


def with_drift(prior: UserPrior, items_IC: np.ndarray, train: Targets, times_B: np.ndarray, seed: int) -> UserPrior:
    """Return the prior with the drift of the user bias that makes the labels of train most likely.

    The labels of a user, treated as new, are Gaussian with the mean V m and the covariance V S V' + D + N of
    `UserPrior`. There is no drift unless it raises the log-likelihood by more than ln(rows), as in the Bayesian
    information criterion for its two numbers.
    """
    users = np.unique(train.user_B)
    drawn = np.random.default_rng(seed).permutation(users)[:DRIFT_USERS]
    known = []
    for user in np.sort(drawn):
        rows = np.flatnonzero(train.user_B == user)
        rows = rows[np.argsort(times_B[rows], kind="stable")][-DRIFT_ROWS:]
        vectors_NC = items_IC[train.item_B[rows]].astype(np.float64)
        without_NN = vectors_NC @ prior.covariance_CC @ vectors_NC.T + prior.outcome_noise * np.eye(len(rows))
        apart_NN = np.abs(np.subtract.outer(times_B[rows], times_B[rows]))
        known.append((without_NN, apart_NN, train.label_B[rows] - vectors_NC @ prior.mean_C))

    def likelihood(variance: float, seconds: float) -> float:
        total = 0.0
        for without_NN, apart_NN, residual_N in known:
            triangle_NN = np.linalg.cholesky(without_NN + variance * np.exp(-apart_NN / seconds))
            total -= (solve_triangular(triangle_NN, residual_N, lower=True) ** 2).sum() / 2
            total -= np.log(np.diag(triangle_NN)).sum()
        return float(total)

    labels = sum(len(residual_N) for *_, residual_N in known)
    best = max((likelihood(*drift), drift) for drift in product(DRIFT_VARIANCES, DRIFT_SECONDS))
    variance, seconds = best[1] if best[0] - likelihood(0.0, 1.0) > np.log(labels) else (0.0, 1.0)
    return replace(prior, drift_variance=variance, drift_seconds=seconds)


def _result(tensors: dict[str, Tensor], state: dict[str, float], config: AlignConfig, semantic_ID: Tensor) -> Collab:
    projection = CollabProjection(config.d_collab, config.d_hidden, semantic_ID.shape[1])
    prefix = "projection."
    projection.load_state_dict(
        {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
    )
    prior = UserPrior(tensors["prior_mean"].numpy(), tensors["prior_covariance"].numpy(), **state)
    text_map = TextMap(tensors["map_center"].numpy(), tensors["map_weight"].numpy(), tensors["map_offset"].numpy())
    return Collab(
        tensors["user_vectors"],
        tensors["item_vectors"],
        semantic_ID,
        tensors["semantic_delta"],
        tensors["user_trained"],
        tensors["item_trained"],
        prior,
        text_map,
        projection,
    )
