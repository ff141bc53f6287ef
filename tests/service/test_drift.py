"""Drift: bins of a reference, the sliding window, and the index against its own formula."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.metrics.drift import LEAST, BinWindow, Reference
from service.metrics.registry import Metrics
from service.metrics.scored import Tally

DECILES = np.linspace(0, 1, 11)


def tally(scores: np.ndarray, *, cold_users: int = 0, cold_items: int = 0, histories: tuple[int, ...] = (5,)) -> Tally:
    return Tally(
        asked=len(scores),
        scores_N=scores.astype(np.float32),
        cold_users=min(cold_users, 1),
        cold_user_pairs=cold_users,
        cold_items=cold_items,
        unknown_items=0,
        histories_Q=np.array(histories),
        history_dropped=0,
    )


@given(batches=st.lists(st.lists(st.integers(0, 3), max_size=25), max_size=12))
@settings(max_examples=60, deadline=None)
def test_a_window_counts_exactly_the_latest_values(batches: list[list[int]]) -> None:
    window = BinWindow(10, 4)
    for batch in batches:
        window.add(np.array(batch, np.intp))
    latest = [value for batch in batches for value in batch][-10:]
    assert window.counts.tolist() == [latest.count(value) for value in range(4)]


def test_deciles_of_a_continuous_quantity_are_ten_equal_bins() -> None:
    values = np.random.default_rng(0).beta(2, 5, 5000)
    reference = Reference.of_deciles(np.quantile(values, DECILES).tolist())
    np.testing.assert_allclose(reference.least, np.arange(1, 10) / 10)
    counts = np.bincount(reference.bins(values), minlength=10)
    assert reference.psi(counts) < 1e-3


def test_whole_numbers_that_share_deciles_do_not_look_like_drift() -> None:
    rng = np.random.default_rng(1)
    known = rng.geometric(0.3, 20_000)
    reference = Reference.of_deciles(np.quantile(known, DECILES).tolist(), whole=True)
    assert len(reference.edges) < 9

    def psi(values: np.ndarray) -> float:
        return reference.psi(np.bincount(reference.bins(values), minlength=reference.bin_count))

    assert psi(rng.geometric(0.3, 20_000)) < 0.01
    assert psi(rng.geometric(0.1, 20_000)) > 0.25


def test_the_index_is_the_sum_of_its_definition() -> None:
    reference = Reference.of_rate(0.2)
    expected = (0.5 - 0.8) * np.log(0.5 / 0.8) + (0.5 - 0.2) * np.log(0.5 / 0.2)
    assert reference.psi(np.array([50, 50])) == pytest.approx(expected)
    assert np.isfinite(Reference.of_rate(0.0).psi(np.array([0, 7])))


def test_shifted_scores_show_and_then_leave_the_window_again() -> None:
    rng = np.random.default_rng(2)
    metrics = Metrics(drift_window=2000)
    metrics.loaded("ab" * 32, {"score_deciles": DECILES.tolist(), "cold_user_rate": 0.1})
    mine = {"bundle": "abababababab"}

    def psi(of: str) -> float | None:
        metrics.text()
        return metrics.registry.get_sample_value("sella_drift_psi", {**mine, "of": of})

    def feed(scores: np.ndarray, cold_users: int) -> None:
        metrics.scored("ab" * 32, "/rank", {}, tally(scores, cold_users=cold_users))

    feed(rng.uniform(size=LEAST - 1), 50)
    assert psi("score") is None
    feed(rng.uniform(size=1501), 150)
    assert psi("score") < 0.05 and psi("cold_user") < 0.05
    assert psi("cold_item") is None  # the reference does not tell
    feed(rng.beta(8, 2, size=2000), 1500)
    assert psi("score") > 0.25 and psi("cold_user") > 0.25
    feed(rng.uniform(size=2000), 200)
    assert psi("score") < 0.05 and psi("cold_user") < 0.05
    counted = sum(
        metrics.registry.get_sample_value("sella_reference_bin_total", {**mine, "of": "score", "bin": str(one)}) or 0
        for one in range(10)
    )
    assert counted == 6000


def test_a_bundle_without_a_reference_has_no_drift_and_still_counts() -> None:
    metrics = Metrics()
    metrics.loaded("ab" * 32, {})
    metrics.scored("ab" * 32, "/rank", {"total": 0.1}, tally(np.full(1000, 0.3)))
    text = metrics.text().decode()
    assert "sella_drift_psi{" not in text and "sella_reference_bin_total{" not in text
    assert 'sella_scores_count{bundle="abababababab"} 1000.0' in text
