import pytest

from models.ids import MAX_ID_LENGTH, IdError, canonical_id


@pytest.mark.parametrize(
    ("value", "expected"), [("007", "007"), (7, "7"), (-3, "-3"), ("ñ 1", "ñ 1"), (10**30, "1" + "0" * 30)]
)
def test_strings_stay_and_integers_become_decimal(value: object, expected: str) -> None:
    assert canonical_id(value) == expected


@pytest.mark.parametrize("value", [True, 1.0, None, b"1", "", "a\nb", "a\x00", "x" * (MAX_ID_LENGTH + 1), ["1"]])
def test_what_is_no_id_is_refused_by_name(value: object) -> None:
    with pytest.raises(IdError, match=r"^id"):
        canonical_id(value)
