"""The fusion: the effect of more evidence on a score, and the parts of a score."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models.fusion import (
    INPUTS,
    PARTS,
    SIGNED,
    Fusion,
    Known,
    Rates,
    Weight,
    Weights,
    fusion_inputs,
    probabilities,
)

one_set = st.builds(
    lambda values, intercept: Weights(
        intercept=intercept,
        weights={
            name: Weight(value=one, low=one, high=one, most=2.0) for name, one in zip(INPUTS, values, strict=True)
        },
    ),
    st.tuples(*(st.floats(-2, 2) if name in SIGNED else st.floats(0, 5) for name in INPUTS)),
    st.floats(-3, 3),
)
fusions = st.builds(
    lambda base, user, item, static, live: Fusion(
        rates=Rates(base=base, user_strength=user, item_strength=item), static=static, live=live
    ),
    st.floats(0.01, 0.99),
    st.floats(0.1, 100),
    st.floats(0.1, 100),
    one_set,
    one_set,
)
counts = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)).map(lambda both: (sum(both), both[0]))


def pair(user: tuple[int, int], item: tuple[int, int], lm: float = 0.3, *, live: bool = True) -> Known:
    """One pair of a warm user and a cold item, with these impressions and positives."""
    rng = np.random.default_rng(0)
    (seen, liked), (shown, clicked) = user, item
    return Known(
        lm_K=np.array([lm]),
        user_KC=rng.normal(size=(1, 6)).astype(np.float32),
        live_user_KC=rng.normal(size=(1, 6)).astype(np.float32),
        item_KC=rng.normal(size=(1, 6)).astype(np.float32),
        liked_KC=rng.normal(size=(1, 6)).astype(np.float32),
        user_impressions_K=np.array([seen]),
        user_positives_K=np.array([liked]),
        item_impressions_K=np.array([shown]),
        item_positives_K=np.array([clicked]),
        cold_user_K=np.array([False]),
        cold_item_K=np.array([True]),
        like_ages_KL=np.array([[20.0, 3600.0, np.inf]], np.float32),
        live=live,
    )


@given(fusions, st.booleans(), counts, counts)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_further_positive_never_lowers_a_score_and_a_further_negative_never_raises_it(
    fusion: Fusion, live: bool, user: tuple[int, int], item: tuple[int, int]
) -> None:
    """For the item and for the user, by either set of weights and with any amount of evidence."""

    def logit(user: tuple[int, int], item: tuple[int, int]) -> float:
        return float(fusion.logits(pair(user, item, live=live))[0])

    before = logit(user, item)
    edge = 1e-9 * (1 + abs(before))
    assert logit(user, (item[0] + 1, item[1] + 1)) >= before - edge
    assert logit((user[0] + 1, user[1] + 1), item) >= before - edge
    assert logit(user, (item[0] + 1, item[1])) <= before + edge
    assert logit((user[0] + 1, user[1]), item) <= before + edge
    if item[1] < item[0]:  # a negative that becomes a positive
        assert logit(user, (item[0], item[1] + 1)) >= before - edge


@given(fusions, st.booleans(), counts, counts, st.floats(-15, 15))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_parts_of_a_score_are_its_logit(
    fusion: Fusion, live: bool, user: tuple[int, int], item: tuple[int, int], lm: float
) -> None:
    known = pair(user, item, lm, live=live)
    parts = fusion.parts(known)
    assert tuple(parts) == PARTS
    assert sum(float(one[0]) for one in parts.values()) == pytest.approx(fusion.logits(known)[0], abs=1e-9)
    assert fusion(known)[0] == pytest.approx(1 / (1 + np.exp(-fusion.logits(known)[0])), abs=1e-6)


def test_static_and_live_counts_are_scored_by_their_own_weights() -> None:
    static, live = (
        Weights(intercept=one, weights={"lm": Weight(value=two, low=two, high=two)})
        for one, two in ((0.1, 2.0), (0.5, 3.0))
    )
    fusion = Fusion(static=static, live=live)
    assert fusion.logits(pair((3, 1), (5, 4), 0.3, live=False))[0] == pytest.approx(0.1 + 2 * 0.3)
    assert fusion.logits(pair((3, 1), (5, 4), 0.3))[0] == pytest.approx(0.5 + 3 * 0.3)
    assert Fusion.model_validate_json(fusion.model_dump_json()) == fusion


def test_live_counts_take_the_users_bias_and_taste_from_the_live_vector() -> None:
    for live, name in ((True, "live_user_KC"), (False, "user_KC")):
        known = pair((3, 1), (5, 4), live=live)
        inputs, user_C = fusion_inputs(known, Rates()), getattr(known, name)[0].astype(float)
        assert inputs["user_bias"][0] == pytest.approx(user_C[-2])
        assert inputs["taste"][0] == pytest.approx(user_C[:-2] @ known.item_KC[0, :-2])
        assert inputs["item_bias"][0] == pytest.approx(known.item_KC[0, -1])


def test_a_recent_like_counts_by_its_age_and_by_the_taste_it_shows() -> None:
    inputs = fusion_inputs(known := pair((3, 1), (5, 4)), Rates())
    assert inputs["recent_likes"][0] == pytest.approx(np.exp(-20 / 300) + np.exp(-12))
    assert inputs["recent_likes_slow"][0] == pytest.approx(np.exp(-20 / 86_400) + np.exp(-1 / 24))
    assert inputs["recent_taste"][0] == pytest.approx(known.liked_KC[0, :-2].astype(float) @ known.item_KC[0, :-2])
    nothing = replace(known, liked_KC=0 * known.liked_KC, like_ages_KL=np.zeros((1, 0), np.float32))
    without = fusion_inputs(nothing, Rates())
    assert {name: one[0] for name, one in without.items() if name.startswith("recent")} == {
        "recent_likes": 0,
        "recent_likes_slow": 0,
        "recent_taste": 0,
    }


def test_a_count_of_recent_likes_has_a_largest_value_and_if_unknown_is_the_mean() -> None:
    likes = Weight(value=0.5, low=0.5, high=0.5, mean=0.3, most=2.0)
    fusion = Fusion(live=Weights(weights={"recent_likes": likes}))
    for ages, counted in (([0.0], 1.0), ([0.0] * 7, 2.0), ([np.nan], 0.3), ([np.inf], 0.0)):
        known = replace(pair((3, 1), (5, 4)), like_ages_KL=np.array([ages], np.float32))
        assert fusion.parts(known)["recent_likes"][0] == pytest.approx(0.5 * counted)
        assert np.isfinite(fusion(known)).all()


def test_weights_of_unknown_inputs_are_refused() -> None:
    with pytest.raises(ValidationError, match="weights of unknown inputs: moon_phase"):
        Weights(weights={"moon_phase": Weight(value=1.0, low=1.0, high=1.0)})


def test_chosen_rows_keep_everything_that_is_known_of_them() -> None:
    one = pair((3, 1), (5, 4), live=False)
    known = one.rows(np.zeros(3, np.int64)).rows(slice(1, 3))
    assert len(known.lm_K) == 2 and not known.live
    np.testing.assert_array_equal(known.item_KC, np.repeat(one.item_KC, 2, axis=0))


def test_probabilities_tell_logits_apart_that_fp32_rounds_to_1_and_overflow_nowhere() -> None:
    logits_K = np.array([-1e30, -800, -np.log(3), 0, 17, 18, 30, 800, 1e30], np.float32)
    raw_K = probabilities(logits_K)
    assert raw_K.dtype == np.float64 and np.isfinite(raw_K).all()
    assert raw_K[[0, 2, 3, 8]] == pytest.approx([0, 0.25, 0.5, 1])
    assert 1 - raw_K[4] == pytest.approx(np.exp(-17), rel=1e-6) and raw_K[4] < raw_K[5] < raw_K[6] < 1
