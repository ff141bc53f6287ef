"""Canonical ids: every user and item id is a string inside sella."""

MAX_ID_LENGTH = 256


class IdError(ValueError):
    """An id that has no canonical form; the message names the value and the mend."""


def canonical_id(value: object) -> str:
    """Return the canonical string of a user or item id.

    Strings stay as they are ("007" stays "007"); integers become their decimal form. Booleans and floats are
    refused, because 1.0, 1 and True would silently become three ids, and so are empty, overlong and unprintable
    strings.

    Raises:
        IdError: the value is not an id.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        shown = f" {value!r}" if value is None or isinstance(value, (bool, float)) else ""
        raise IdError(f"id{shown} is a {type(value).__name__}; give a string or an integer")
    text = str(value)
    if not text or len(text) > MAX_ID_LENGTH:
        raise IdError(f"id {text[:40]!r} has {len(text)} characters; give 1 to {MAX_ID_LENGTH}")
    if not text.isprintable():
        odd = next(character for character in text if not character.isprintable())
        raise IdError(f"id {text[:40]!r} holds U+{ord(odd):04X}, which does not print; remove it")
    return text
