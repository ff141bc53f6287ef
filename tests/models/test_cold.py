import numpy as np
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
    if trained:
        found = known.updated(vector, seen, items, labels, liked)
        mean, left, observed = vector, 8.0 / (8.0 + seen), (items.T @ items / 0.3, items.T @ labels / 0.3)
    else:
        found = known.updated(None, seen, items, labels, liked)
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
    np.testing.assert_array_equal(known.updated(vector, 7, nothing, labels, liked), vector)
    np.testing.assert_array_equal(known.updated(None, 0, nothing, labels, liked), known.fold_in(liked))


def test_a_vector_of_many_train_impressions_moves_less_and_its_constant_never() -> None:
    covariance = np.diag([1.0, 0.5, 0.0]).astype(np.float32)
    known = UserPrior(np.array([0.0, 0.0, 1.0], np.float32), covariance, 0.7, 0.4, 0.2, 10.0)
    vector, item = np.array([0.1, 0.2, 1.0], np.float32), np.array([[1.0, 1.0, 0.4]], np.float32)
    moved = [known.updated(vector, n, item, np.ones(1, np.float32), item[:0]) - vector for n in (0, 10, 1000)]
    assert all((one[:2] > 0).all() and one[2] == 0 for one in moved)
    assert moved[0][0] > moved[1][0] > moved[2][0] and moved[2][0] < 0.02


def test_the_text_map_finds_a_linear_map_and_trusts_by_weight() -> None:
    rng = np.random.default_rng(0)
    semantic = rng.normal(size=(300, 6)).astype(np.float32) + 5
    weight = rng.normal(size=(6, 3)).astype(np.float32)
    collab = semantic @ weight + 1
    collab[:100] += rng.normal(scale=5, size=(100, 3))  # items nobody is sure of
    trust = np.r_[np.full(100, 1e-6), np.ones(200)].astype(np.float32)
    mapped = fit_text_map(semantic, collab.astype(np.float32), trust, ridge=1e-4)(semantic[100:])
    assert np.corrcoef(mapped.ravel(), collab[100:].ravel())[0, 1] > 0.999
