"""The fusion: what more evidence may do to a score, and what a score is made of."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.fusion import INPUTS, PARTS, SIGNED, Fusion, Known, Rates, Weight, raw_logits

weights = st.floats(0, 5)
fusions = st.builds(
    lambda base, user, item, values, intercept: Fusion(
        rates=Rates(base=base, user_strength=user, item_strength=item),
        intercept=intercept,
        weights={name: Weight(value=one, low=one, high=one) for name, one in zip(INPUTS, values, strict=True)},
    ),
    st.floats(0.01, 0.99),
    st.floats(0.1, 100),
    st.floats(0.1, 100),
    st.tuples(*(st.floats(-2, 2) if name in SIGNED else weights for name in INPUTS)),
    st.floats(-3, 3),
)
counts = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)).map(lambda both: (sum(both), both[0]))


def pair(user: tuple[int, int], item: tuple[int, int], lm: float = 0.3) -> Known:
    """One pair of a warm user and a cold item, of these impressions and positives."""
    rng = np.random.default_rng(0)
    (seen, liked), (shown, clicked) = user, item
    return Known(
        lm_K=np.array([lm]),
        user_KC=rng.normal(size=(1, 6)).astype(np.float32),
        item_KC=rng.normal(size=(1, 6)).astype(np.float32),
        user_impressions_K=np.array([seen]),
        user_positives_K=np.array([liked]),
        item_impressions_K=np.array([shown]),
        item_positives_K=np.array([clicked]),
        cold_user_K=np.array([False]),
        cold_item_K=np.array([True]),
    )


@given(fusions, counts, counts)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_further_positive_never_lowers_a_score_and_a_further_negative_never_raises_it(
    fusion: Fusion, user: tuple[int, int], item: tuple[int, int]
) -> None:
    """Of the item and of the user, whatever the weights and however much is known."""
    before = fusion.logits(pair(user, item))[0]
    edge = 1e-9 * (1 + abs(before))
    assert fusion.logits(pair(user, (item[0] + 1, item[1] + 1)))[0] >= before - edge
    assert fusion.logits(pair((user[0] + 1, user[1] + 1), item))[0] >= before - edge
    assert fusion.logits(pair(user, (item[0] + 1, item[1])))[0] <= before + edge
    assert fusion.logits(pair((user[0] + 1, user[1]), item))[0] <= before + edge
    if item[1] < item[0]:  # a negative that becomes a positive
        assert fusion.logits(pair(user, (item[0], item[1] + 1)))[0] >= before - edge


@given(fusions, counts, counts, st.floats(-15, 15))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_parts_of_a_score_are_its_logit(
    fusion: Fusion, user: tuple[int, int], item: tuple[int, int], lm: float
) -> None:
    known = pair(user, item, lm)
    parts = fusion.parts(known)
    assert tuple(parts) == PARTS
    assert sum(float(one[0]) for one in parts.values()) == pytest.approx(fusion.logits(known)[0], abs=1e-9)
    assert fusion(known)[0] == pytest.approx(1 / (1 + np.exp(-fusion.logits(known)[0])), abs=1e-6)


def test_the_logit_of_a_raw_score_is_finite_where_fp32_has_rounded_it_to_0_or_1() -> None:
    raw_K = np.array([0, 0.25, 1], np.float32)
    assert raw_logits(raw_K) == pytest.approx([-np.log(1e7), -np.log(3), np.log(1e7)], abs=1e-6)
