from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.cold import UserPrior, fit_text_map


def prior(rng: np.random.Generator, width: int, target: float = 0.7, noise: float = 0.4) -> UserPrior:
    root = rng.normal(size=(width, width)).astype(np.float32)
    return UserPrior(
        rng.normal(size=width).astype(np.float32), (root @ root.T).astype(np.float32), target, noise, 0.3, 8.0
    )


@given(st.integers(0, 1000), st.integers(1, 12))
def test_fold_in_is_the_gaussian_posterior_mean(seed: int, liked: int) -> None:
    rng = np.random.default_rng(seed)
    known = prior(rng, 5)
    items = rng.normal(size=(liked, 5)).astype(np.float32)
    precision = np.linalg.inv(known.covariance_CC.astype(np.float64))
    left = precision + items.T @ items / known.noise
    right = precision @ known.mean_C + items.T @ np.full(liked, known.target) / known.noise
    # Compared in predictions: the prior may leave a direction nearly free.
    np.testing.assert_allclose(items @ known.fold_in(items), items @ np.linalg.solve(left, right), atol=2e-2)


def test_no_history_is_the_prior_mean() -> None:
    known = prior(np.random.default_rng(0), 4)
    np.testing.assert_array_equal(known.fold_in(np.zeros((0, 4), np.float32)), known.mean_C)


def test_a_dimension_without_variance_stays_as_it_is() -> None:
    covariance = np.diag([1.0, 0.0]).astype(np.float32)
    known = UserPrior(np.array([0.0, 1.0], np.float32), covariance, 1.0, 0.1, 0.1, 5.0)
    folded = known.fold_in(np.array([[1.0, 0.3], [0.5, 0.2]], np.float32))
    assert folded[1] == 1.0 and folded[0] > 0.5


@given(st.integers(0, 1000), st.integers(1, 12), st.booleans())
def test_outcomes_update_a_vector_as_the_gaussian_posterior(seed: int, count: int, trained: bool) -> None:
    rng = np.random.default_rng(seed)
    known = prior(rng, 5)
    items, vector = rng.normal(size=(count, 5)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    labels = rng.integers(0, 2, count).astype(np.float32)
    liked = rng.normal(size=(2, 5)).astype(np.float32)
    seen = int(rng.integers(0, 50))
    times = np.arange(count, dtype=np.float64)
    if trained:
        found = known.updated(vector, seen, items, labels, times, 20.0, liked)
        mean, left, observed = vector, 8.0 / (8.0 + seen), (items.T @ items / 0.3, items.T @ labels / 0.3)
    else:
        found = known.updated(None, seen, items, labels, times, 20.0, liked)
        mean, left = known.mean_C, 1.0
        observed = (
            items.T @ items / 0.3 + liked.T @ liked / known.noise,
            items.T @ labels / 0.3 + liked.sum(0) * known.target / known.noise,
        )
    precision = np.linalg.inv(left * known.covariance_CC.astype(np.float64))
    wanted = np.linalg.solve(precision + observed[0], precision @ mean + observed[1])
    np.testing.assert_allclose(items @ found, items @ wanted, atol=2e-2)


def test_without_outcomes_a_vector_stays_as_it_is() -> None:
    rng = np.random.default_rng(0)
    known, nothing, labels = prior(rng, 4), np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
    vector, liked = rng.normal(size=4).astype(np.float32), rng.normal(size=(3, 4)).astype(np.float32)
    no_times = np.zeros(0)
    np.testing.assert_array_equal(known.updated(vector, 7, nothing, labels, no_times, 1.0, liked), vector)
    np.testing.assert_array_equal(known.updated(None, 0, nothing, labels, no_times, 1.0, liked), known.fold_in(liked))


def test_a_vector_of_many_train_impressions_moves_less_and_its_constant_never() -> None:
    covariance = np.diag([1.0, 0.5, 0.0]).astype(np.float32)
    known = UserPrior(np.array([0.0, 0.0, 1.0], np.float32), covariance, 0.7, 0.4, 0.2, 10.0)
    vector, item = np.array([0.1, 0.2, 1.0], np.float32), np.array([[1.0, 1.0, 0.4]], np.float32)
    moved = [
        known.updated(vector, n, item, np.ones(1, np.float32), np.zeros(1), 1.0, item[:0]) - vector
        for n in (0, 10, 1000)
    ]
    assert all((one[:2] > 0).all() and one[2] == 0 for one in moved)
    assert moved[0][0] > moved[1][0] > moved[2][0] and moved[2][0] < 0.02


@pytest.mark.parametrize("trained", [True, False])
def test_a_drifting_bias_follows_the_newest_outcomes_and_is_forgotten(trained: bool) -> None:
    """The posterior of a bias that is an Ornstein-Uhlenbeck process, from its joint Gaussian in fp64."""
    rng = np.random.default_rng(3)
    plain = prior(rng, 5)
    known = replace(plain, drift_variance=0.5, drift_seconds=100.0)
    items, vector = rng.normal(size=(4, 5)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    labels, liked = np.array([1, 0, 1, 1], np.float32), rng.normal(size=(2, 5)).astype(np.float32)
    times = np.array([0.0, 90.0, 100.0, 5000.0])
    mean, left, cold = (vector, 8.0 / (8.0 + 5), 0) if trained else (known.mean_C, 1.0, len(liked))

    def at(moment: float, of: UserPrior = known) -> np.ndarray:
        return of.updated(vector if trained else None, 5, items, labels, times, moment, liked)

    seen = np.concatenate([items, liked[:cold]]).astype(np.float64)
    target = np.concatenate([labels, np.full(cold, known.target)]) - seen @ mean
    system = seen @ (left * known.covariance_CC.astype(np.float64)) @ seen.T
    system += np.diag([known.outcome_noise] * 4 + [known.noise] * cold)
    system[:4, :4] += 0.5 * np.exp(-np.abs(np.subtract.outer(times, times)) / 100)
    for moment in (5000.0, 5050.0, np.inf):
        gain = left * known.covariance_CC.astype(np.float64) @ seen.T
        gain[3, :4] += 0.5 * np.exp(-(moment - times) / 100)
        np.testing.assert_allclose(at(moment), mean + gain @ np.linalg.solve(system, target), atol=2e-4)
    assert np.array_equal(at(np.inf)[[0, 1, 2, 4]], at(5000.0)[[0, 1, 2, 4]]) and at(np.inf)[3] != at(5000.0)[3]
    assert not np.allclose(at(np.inf), at(np.inf, plain), atol=1e-3)  # outcomes at one time say less of the rest
    assert np.array_equal(at(5000.0, plain), at(np.inf, plain))


def test_an_outcome_ahead_of_the_clock_counts_as_one_of_the_moment() -> None:
    rng = np.random.default_rng(4)
    known = replace(prior(rng, 5), drift_variance=0.5, drift_seconds=100.0)
    vector, item = rng.normal(size=5).astype(np.float32), rng.normal(size=(1, 5)).astype(np.float32)
    now, ahead = (
        known.updated(vector, 5, item, np.ones(1, np.float32), np.array([time]), 1000.0, item[:0])
        for time in (1000.0, 8200.0)
    )
    np.testing.assert_array_equal(ahead, now)


def test_the_text_map_finds_a_linear_map_and_trusts_by_weight() -> None:
    rng = np.random.default_rng(0)
    semantic = rng.normal(size=(300, 6)).astype(np.float32) + 5
    weight = rng.normal(size=(6, 3)).astype(np.float32)
    collab = semantic @ weight + 1
    collab[:100] += rng.normal(scale=5, size=(100, 3))  # items nobody is sure of
    trust = np.r_[np.full(100, 1e-6), np.ones(200)].astype(np.float32)
    mapped = fit_text_map(semantic, collab.astype(np.float32), trust, ridge=1e-4)(semantic[100:])
    assert np.corrcoef(mapped.ravel(), collab[100:].ravel())[0, 1] > 0.999
