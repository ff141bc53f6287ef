from datetime import datetime
from itertools import pairwise

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from training.data.errors import DataError
from training.data.split import SPLITS, SplitRule, split_by_time


def frame(timestamps: list[float]) -> pl.DataFrame:
    return pl.DataFrame({"timestamp": timestamps}, schema={"timestamp": pl.Float64}).with_row_index("row")


def test_default_is_eight_tenths_one_tenth_one_tenth_in_time_order() -> None:
    parts = split_by_time(frame([float(100 - row) for row in range(100)]), SplitRule(), "t.csv")
    assert {name: part.height for name, part in parts.items()} == {"train": 80, "valid": 10, "test": 10}
    assert parts["test"]["row"].to_list() == list(range(10))


@given(
    st.lists(st.integers(0, 12), min_size=3, max_size=60),
    st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5), (0.34, 0.33, 0.33), (0.9, 0.1)]),
)
@settings(deadline=None)
def test_cuts_keep_every_row_in_time_order_and_never_separate_equal_timestamps(
    timestamps: list[float], fractions: tuple[float, ...]
) -> None:
    try:
        parts = split_by_time(frame(timestamps), SplitRule.model_validate({"fractions": fractions}), "t.csv")
    except DataError as error:
        assert "is empty when cut by time" in str(error)
        return
    assert list(parts) == list(SPLITS[: len(fractions)])
    rows = [row for part in parts.values() for row in part["row"]]
    assert sorted(rows) == list(range(len(timestamps)))
    spans = [(min(part["timestamp"]), max(part["timestamp"])) for part in parts.values()]
    assert all(earlier[1] < later[0] for earlier, later in pairwise(spans))
    assert all(part["row"].is_sorted() for part in parts.values())


def test_a_cut_within_equal_timestamps_moves_to_the_nearest_change() -> None:
    early = split_by_time(frame([1, 1, 2, 2, 2, 2, 2, 3]), SplitRule(fractions=(0.5, 0.5)), "t.csv")
    assert early["train"].height == 2
    late = split_by_time(frame([1, 1, 1, 1, 1, 1, 1, 2]), SplitRule(fractions=(0.5, 0.5)), "t.csv")
    assert late["train"].height == 7


def test_dates_are_the_first_moments_of_valid_and_test() -> None:
    day = 86_400
    rule = SplitRule.model_validate({"dates": ("1970-01-02", "1970-01-03T00:00:00+00:00")})
    parts = split_by_time(frame([0, day - 1, day, 2 * day - 0.5, 2 * day]), rule, "t.csv")
    assert [part["row"].to_list() for part in parts.values()] == [[0, 1], [2, 3], [4]]
    assert list(split_by_time(frame([0, day]), SplitRule(dates=(datetime(1970, 1, 2),)), "t")) == ["train", "valid"]


def test_an_empty_split_is_told_with_the_span_of_the_data() -> None:
    with pytest.raises(DataError) as raised:
        split_by_time(frame([0, 86_400]), SplitRule.parse("2001-01-01"), "all.csv")
    assert str(raised.value) == (
        "all.csv: split 'valid' is empty when cut by time; choose other fractions or dates within "
        "1970-01-01T00:00:00+00:00 to 1970-01-02T00:00:00+00:00"
    )
    with pytest.raises(DataError, match="split 'valid' is empty"):
        split_by_time(frame([5, 5, 5]), SplitRule(), "all.csv")


@pytest.mark.parametrize(
    "given_rule",
    [
        {"fractions": (0.8, 0.1)},
        {"fractions": (1.1, -0.1)},
        {"fractions": (1.0,)},
        {"dates": ("2017-12-01", "2017-11-01")},
        {"dates": ("2017-12-01", "2017-12-01")},
        {"fractions": (0.9, 0.1), "dates": ("2017-12-01",)},
        {"months": 3},
    ],
)
def test_rules_that_cannot_be_meant_are_refused(given_rule: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SplitRule.model_validate(given_rule)


def test_command_lines_give_fractions_or_dates() -> None:
    assert SplitRule.parse("0.7, 0.2,0.1") == SplitRule(fractions=(0.7, 0.2, 0.1))
    assert SplitRule.parse("2017-11-01").dates == (datetime(2017, 11, 1),)
    with pytest.raises(DataError, match=r"^split '0.9,0.3': fractions .* must .* sum to 1; give fractions as in"):
        SplitRule.parse("0.9,0.3")
    with pytest.raises(DataError, match=r"^split 'tomorrow': .*give fractions as in 0.8,0.1,0.1 or dates as in"):
        SplitRule.parse("tomorrow")
