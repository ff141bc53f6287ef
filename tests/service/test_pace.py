import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.pace import Pace


def test_nothing_is_known_before_a_batch_was_measured() -> None:
    assert not Pace().known and Pace().seconds(1000, 100) == 0


@given(st.floats(0, 0.1), st.floats(1e-6, 1e-2), st.lists(st.integers(50, 3000), min_size=30, max_size=60))
def test_a_fixed_cost_and_a_cost_by_token_are_told_apart(fixed: float, each: float, sizes: list[int]) -> None:
    pace = Pace()
    for tokens in [60, 2900, *sizes, 60, 2900]:
        pace.record(tokens, fixed + each * tokens)
    assert pace.seconds(1000, 2000) == pytest.approx(fixed + each * 1000, rel=1e-3, abs=1e-6)
    assert pace.seconds(20_000, 2000) == pytest.approx(10 * fixed + each * 20_000, rel=1e-3, abs=1e-6)


def test_batches_of_one_size_give_a_rate() -> None:
    pace = Pace()
    for _ in range(5):
        pace.record(1000, 0.5)
    assert pace.seconds(2000, 1000) == pytest.approx(1.0)


def test_a_changed_pace_is_learned() -> None:
    pace = Pace()
    for _ in range(50):
        pace.record(1000, 0.5)
    for _ in range(100):
        pace.record(1000, 2.0)
    assert pace.seconds(1000, 1000) == pytest.approx(2.0, rel=0.02)


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 100)), min_size=1, max_size=40), st.integers(1, 10**6))
def test_an_estimate_is_never_negative(batches: list[tuple[int, float]], tokens: int) -> None:
    pace = Pace()
    for size, seconds in batches:
        pace.record(size, seconds)
    assert pace.seconds(tokens, 2048) >= 0
