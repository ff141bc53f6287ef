"""The one form of a title: what data, batch scoring, the prompt command and the service make of the same text.

Two titles that a reader cannot tell apart must have the same tokens, or a copied blank would move a score:

- Runs of blanks, line breaks and control characters become one space, and the ends are trimmed. Some letters and
  symbols of Unicode show as a blank; they count as blanks.
- Characters that show nothing and join nothing are dropped, such as a byte order mark, a zero-width space, a soft
  hyphen and marks of direction. A zero-width joiner or non-joiner stays inside a title: it changes emoji and letters.
- The text is in Unicode's form NFC. The same `é` may be one character or two, by the keyboard or the file system it
  came from. Language models have mostly read NFC. NFKC would change what is seen, as `²` to `2`.
"""

import re
from unicodedata import category, normalize

# Python's \s has every blank of Unicode and line breaks. The rest are controls, and fillers that show as a blank.
_BLANKS = re.compile("[\\s\x00-\x1f\x7f-\x9f\u2800\u3164\uffa0]+")
_NOTHING = re.compile("[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]+")
_ENDS = " \u200c\u200d"
# Controls, formats and private characters (categories) and these fillers and selectors alone do not make a title.
_HIDDEN = frozenset({"Cc", "Cf", "Co"})
_FILLERS = re.compile("[\\s\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")


class TitleError(ValueError):
    """Text that is no title; the message says why."""


def clean_title(text: str) -> str:
    """Return the form of a title that stands in a prompt. A clean title stays as it is.

    Raises:
        TitleError: the text shows nothing, or holds half of a surrogate pair, which no encoding has.
    """
    if text.isascii() and text.isprintable() and text and "  " not in text and text[0] != " " != text[-1]:
        return text
    # In this order: what is dropped may have stood between two blanks, or between a letter and its accent.
    cleaned = normalize("NFC", _BLANKS.sub(" ", _NOTHING.sub("", text)).strip(_ENDS))
    try:
        cleaned.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(cleaned[error.start]):04X}"
        raise TitleError(f"a title holds {found}, half of a surrogate pair; remove it") from None
    if all(category(one) in _HIDDEN or _FILLERS.match(one) for one in cleaned):
        raise TitleError("a title is blank; leave it out or give its text")
    return cleaned
