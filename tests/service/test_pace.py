import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.pace import Pace


def measured(*batches: tuple[int, float]) -> Pace:
    pace = Pace()
    for tokens, seconds in batches:
        pace.record(tokens, seconds)
    return pace


def test_nothing_is_known_before_a_few_batches_were_measured() -> None:
    pace = measured((30, 20.0), (30, 20.0))
    assert not pace.known and pace.seconds(1000, 100) == 0


@given(st.floats(1e-3, 0.1), st.floats(1e-6, 1e-2), st.lists(st.integers(50, 3000), max_size=20))
def test_a_fixed_cost_and_a_cost_by_token_are_told_apart(fixed: float, each: float, sizes: list[int]) -> None:
    pace = measured(*((tokens, fixed + each * tokens) for tokens in [60, 2900, 1500, *sizes, 60, 2900, 1500]))
    assert pace.seconds(1000, 2000) == pytest.approx(fixed + each * 1000, rel=0.5)
    assert pace.seconds(20_000, 2000) == pytest.approx(10 * fixed + each * 20_000, rel=0.5)


def test_a_line_is_found_exactly_where_no_batch_is_a_freak() -> None:
    pace = measured(*((tokens, 0.02 + 1e-4 * tokens) for tokens in (500, 700, 600, 900, 400)))
    assert pace.seconds(2000, 2000) == pytest.approx(0.02 + 0.2)


def test_small_batches_alone_say_nothing_of_the_cost_by_token() -> None:
    """Or a burst after quiet hours would be refused for a cost that is fixed."""
    assert measured(*[(20, 0.05)] * 60).seconds(4096, 2048) == pytest.approx(0.1)


def test_a_changed_pace_is_learned() -> None:
    pace = measured(*[(1000, 0.5)] * 50, *[(1000, 2.0)] * 60)
    assert pace.seconds(1000, 1000) == pytest.approx(2.0, rel=0.02)


def test_one_freak_batch_moves_little() -> None:
    before = [(tokens, 1e-4 * tokens + 0.02) for tokens in (300, 2000, 1200, 700) * 5]
    expected = measured(*before).seconds(4096, 2048)
    assert measured(*before, (2000, 55.0)).seconds(4096, 2048) < 2 * expected
    assert measured(*before, (300, 50.0)).seconds(4096, 2048) < 2 * expected


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 100)), min_size=1, max_size=40), st.integers(1, 10**6))
def test_an_estimate_is_never_negative(batches: list[tuple[int, float]], tokens: int) -> None:
    assert measured(*batches).seconds(tokens, 2048) >= 0
