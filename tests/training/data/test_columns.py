import time
from datetime import UTC, date, datetime, timedelta, timezone

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ids import IdError, canonical_id
from training.data.columns import (
    parse_ids,
    parse_labels,
    parse_ratings,
    parse_timestamps,
    parse_titles,
    parse_weights,
)
from training.data.errors import DataError
from training.data.tables import Table


def table(**columns: object) -> Table:
    return Table("t.csv", pl.DataFrame(columns, strict=False))


@given(st.lists(st.text(max_size=5), min_size=1, max_size=5))
@settings(deadline=None)
def test_ids_are_taken_or_refused_as_canonical_id_says(ids: list[str]) -> None:
    def canonical(value: str) -> str | None:
        try:
            return canonical_id(value)
        except IdError:
            return None

    expected = [canonical(value) for value in ids]
    if None in expected:
        with pytest.raises(DataError, match=rf"t\.csv: column 'i', row {expected.index(None) + 1}: |is no id"):
            parse_ids(table(i=ids), "i")
    else:
        assert parse_ids(table(i=ids), "i").to_list() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pl.Series([7, -1], dtype=pl.Int8), ["7", "-1"]),
        (pl.Series([2**64 - 1], dtype=pl.UInt64), ["18446744073709551615"]),
        (pl.Series(["007", " 7"]), ["007", " 7"]),
        (pl.Series(["b", "a"], dtype=pl.Categorical), ["b", "a"]),
    ],
)
def test_ids_become_strings_and_nothing_else_happens_to_them(values: pl.Series, expected: list[str]) -> None:
    assert parse_ids(Table("t", values.alias("i").to_frame()), "i").to_list() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "t.csv: column 'i' is of type Float64; ids are strings or integers, so cast it"),
        ([True], "t.csv: column 'i' is of type Boolean; ids are strings or integers, so cast it"),
        (["a", None, ""], "t.csv: column 'i', row 2: null is no id; fill it in or drop the row (2 rows"),
        ([1, None], "t.csv: column 'i', row 2: null is no id"),
        ([None], "t.csv: column 'i', row 1: null is no id"),
        (["a", "a", "b\n"], "t.csv: column 'i', row 3: id 'b\\n' holds U+000A, which does not print"),
    ],
)
def test_what_is_no_id_is_refused(values: list[object], message: str) -> None:
    with pytest.raises(DataError) as raised:
        parse_ids(table(i=values), "i")
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("ids", [["123.0"], ["7.0", "8.0", "-1.00"]])
def test_ids_that_a_program_wrote_as_floats_are_refused(ids: list[str]) -> None:
    """Clients send 123: served, every such item would be unknown."""
    with pytest.raises(DataError) as raised:
        parse_ids(table(i=ids), "i")
    assert str(raised.value) == (
        f"t.csv: column 'i': every id ends in .0, as in '{ids[0]}': a program wrote integers as floats; write them as"
        " integers"
    )


@pytest.mark.parametrize("ids", [["1.0", "beta"], ["1.0", "1.1"], ["v1.0"], [".0"]])
def test_ids_with_a_point_that_are_no_floats_stay(ids: list[str]) -> None:
    assert parse_ids(table(i=ids), "i").to_list() == ids


@pytest.mark.parametrize(
    "values",
    [
        ["20171130", "20171201"],
        [20171130, 20171201],
        [20171130.0],
        ["2017", "2018"],
        [2017, 1999],
        ["201711", "201712"],
        [201711301200],
        ["20171130120000"],
        ["2017-11-30", "20171201"],
        ["20171201", "1512043200"],
    ],
)
def test_dates_written_as_one_number_are_no_seconds_of_1970(values: list[object]) -> None:
    with pytest.raises(DataError, match=r"t\.csv: column 't', row \d: .* reads as a date, not as seconds since 1970"):
        parse_timestamps(table(t=values), "t")


@pytest.mark.parametrize("values", [[10, 20171130, 20], [1, 2, 3], [17500, 17501], [20171340], [2101], [1512043200]])
def test_seconds_stay_seconds(values: list[int]) -> None:
    assert parse_timestamps(table(t=values), "t").to_list() == values


def test_titles_end_up_on_one_line_and_keep_their_characters() -> None:
    raw = ["  A\t\tB\r\nC ", 'He said "no", twice', "東京\u00a0物語", "a\x00\x1fb\x85c\u2028d", "<unk> é"]
    titles = parse_titles(table(title=raw), "title").to_list()
    assert titles == ["A B C", 'He said "no", twice', "東京 物語", "a b c d", "<unk> é"]


@pytest.mark.parametrize("blank", [None, "", " \t", "\u200b", "\x00", "\u00a0\n"])
def test_blank_titles_are_refused(blank: str | None) -> None:
    with pytest.raises(DataError, match=r"column 'title', row 2: .* is no title; give every item a title"):
        parse_titles(table(title=["A", blank]), "title")


@given(
    st.datetimes(min_value=datetime(1900, 1, 1), max_value=datetime(2100, 1, 1)),
    st.integers(-14 * 60, 14 * 60),
)
@settings(deadline=None)
def test_iso_timestamps_are_the_seconds_python_gives(moment: datetime, minutes: int) -> None:
    zoned = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    utc = moment.replace(tzinfo=UTC)
    texts = [zoned.isoformat(), moment.isoformat(), f"{moment.isoformat(sep=' ')}Z"]
    parsed = parse_timestamps(table(t=texts), "t").to_list()
    assert parsed == pytest.approx([zoned.timestamp(), utc.timestamp(), utc.timestamp()], abs=1e-5)


def test_timestamps_without_a_zone_are_utc_wherever_the_machine_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert parse_timestamps(table(t=["1970-01-02"]), "t").to_list() == [86_400]
    finally:
        monkeypatch.undo()
        time.tzset()


def test_every_form_of_one_moment_is_the_same_number() -> None:
    forms = ["1512043200", " 1512043200.0", "1.5120432e9", "2017-11-30T12:00:00Z", "2017-11-30 12:00"]
    parsed = parse_timestamps(table(t=[*forms, "2017-11-30T13:00:00+01:00"]), "t")
    assert parsed.dtype == pl.Int64
    assert parsed.to_list() == [1_512_043_200] * 6
    for unit in ("ms", "us", "ns"):
        typed = pl.Series("t", [datetime(2017, 11, 30, 12)], dtype=pl.Datetime(unit))  # type: ignore[arg-type]
        assert parse_timestamps(Table("t", typed.to_frame()), "t").to_list() == [1_512_043_200]
    zoned = pl.Series("t", [datetime(2017, 11, 30, 12)]).dt.replace_time_zone("UTC")
    tokyo = zoned.dt.convert_time_zone("Asia/Tokyo")
    assert parse_timestamps(Table("t", tokyo.to_frame()), "t").to_list() == [1_512_043_200]
    assert parse_timestamps(table(t=[date(1970, 1, 2)]), "t").to_list() == [86_400]


def test_timestamps_are_whole_numbers_exactly_when_all_are_whole() -> None:
    assert parse_timestamps(table(t=[1.0, 2.0]), "t").dtype == pl.Int64
    halves = parse_timestamps(table(t=["1", "2.5"]), "t")
    assert (halves.dtype, halves.to_list()) == (pl.Float64, [1.0, 2.5])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1", "soon"], "t.csv: column 't', row 2: 'soon' is no timestamp; give UTC seconds or ISO 8601"),
        (["1", "", "2017-13-01"], "t.csv: column 't', row 2: '' is no timestamp"),
        (["nan"], "t.csv: column 't', row 1: 'nan' is no timestamp"),
        ([float("inf")], "t.csv: column 't', row 1: inf is no timestamp"),
        ([None], "t.csv: column 't', row 1: null is no timestamp"),
        ([1512043200000], "t.csv: column 't', row 1: 1512043200000 is outside the years 1 to 9999; give seconds,"),
        ([True], "t.csv: column 't' is of type Boolean; give numbers"),
    ],
)
def test_unreadable_timestamps_are_refused(values: list[object], message: str) -> None:
    with pytest.raises(DataError) as raised:
        parse_timestamps(table(t=values), "t")
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("values", [["0", "1"], [0, 1], [0.0, 1.0], [False, True], ["0.0", " 1"]])
def test_labels_are_0_and_1_in_any_spelling_of_a_number(values: list[object]) -> None:
    labels = parse_labels(table(label=values))
    assert (labels.dtype, labels.to_list()) == (pl.Int8, [0, 1])


@pytest.mark.parametrize("bad", ["2", "-1", "0.5", "yes", "", "nan", None])
def test_other_labels_are_refused(bad: str | None) -> None:
    with pytest.raises(DataError, match=r"column 'label', row 2: .* is neither 0 nor 1; give 0 or 1, or name the"):
        parse_labels(table(label=["1", bad]))


def test_ratings_are_positive_strictly_above_the_threshold() -> None:
    assert parse_ratings(table(rating=["3", "3.5", "4"]), 3.5).to_list() == [0, 0, 1]


@pytest.mark.parametrize("bad", ["", "good", "inf", None])
def test_ratings_that_are_no_numbers_are_refused(bad: str | None) -> None:
    with pytest.raises(DataError, match=r"column 'rating', row 2: .* is no finite number"):
        parse_ratings(table(rating=["1", bad]), 3)


def test_weights_default_to_one() -> None:
    weights = parse_weights(table(user_id=["a", "b"]))
    assert (weights.name, weights.dtype, weights.to_list()) == ("weight", pl.Float32, [1.0, 1.0])
    assert parse_weights(table(weight=["2", "0.5"])).to_list() == [2.0, 0.5]


# 1e-50 is above zero, but not in the 32 bits that a weight is kept in; 1e50 is not finite in them.
@pytest.mark.parametrize("bad", ["0", "-1", "nan", "inf", "", "1e-50", "1e50", None])
def test_weights_must_be_positive_and_finite(bad: str | None) -> None:
    with pytest.raises(DataError, match=r"column 'weight', row 2: .* is no positive finite number"):
        parse_weights(table(weight=["1", bad]))
