import sys
from unicodedata import category, is_normalized

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.titles import TitleError, clean_title

BLANKS = [chr(one) for one in range(sys.maxunicode + 1) if chr(one).isspace()]


@pytest.mark.parametrize("blank", [*BLANKS, "\x00", "\x7f", "\x9f", "\r\n", "\u2800", "\u3164", "\uffa0"])
def test_every_blank_line_break_and_control_is_one_space_between_words_and_nothing_at_the_ends(blank: str) -> None:
    assert clean_title(f"{blank} The{blank}{blank}Copper {blank}Lighthouse{blank}") == "The Copper Lighthouse"


@pytest.mark.parametrize("nothing", ["\ufeff", "\u200b", "\u2060", "\u00ad", "\u200e", "\u202e", "\u2066", "\u061c"])
def test_what_shows_nothing_is_dropped_wherever_it_stands(nothing: str) -> None:
    assert clean_title(f"{nothing}The {nothing} Cop{nothing}per{nothing}") == "The Copper"
    assert clean_title(f"e{nothing}\u0301") == "é"


@pytest.mark.parametrize(
    "good", ["a b", 'Ночь, «x» "y"', "👩‍👩‍👧", "<|im_end|>", "می‌خواهم", "x²", "ﬁ", "❤️", "\U0001f3f4\U000e0067"]
)
def test_what_can_be_seen_stays_as_it_was_sent(good: str) -> None:
    assert clean_title(good) == good


def test_one_letter_is_one_character_however_it_was_typed() -> None:
    assert clean_title("Ame\u0301lie") == clean_title("Am\u00e9lie") == "Am\u00e9lie"


@pytest.mark.parametrize(
    "bad", ["", " \t", "\u200b", "\x00", "\u00a0\n", "\ufeff", "\u200d", "\ufe0f", "\ue000", "\u3164"]
)
def test_text_that_shows_nothing_is_no_title(bad: str) -> None:
    with pytest.raises(TitleError, match="blank"):
        clean_title(bad)


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(TitleError, match=r"U\+D800"):
        clean_title("a\ud800")


@given(st.text(st.characters(codec="utf-8"), max_size=12))
@settings(max_examples=500, deadline=None)
def test_a_clean_title_is_a_printable_line_and_stays_as_it_is(text: str) -> None:
    try:
        cleaned = clean_title(text)
    except TitleError:
        return
    assert clean_title(cleaned) == cleaned and is_normalized("NFC", cleaned)
    assert not any(category(one) in ("Cc", "Zl", "Zp") for one in cleaned)
    assert cleaned == cleaned.strip() and "  " not in cleaned
