"""The keys of one file: who each belongs to, and how many requests a second it may make."""

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SECRET = re.compile(r"[A-Za-z0-9._~+/=-]{16,256}")


class KeyFileError(ValueError):
    """A key file that cannot be used; the message names file, line and mend, and never a key."""


@dataclass(frozen=True)
class Key:
    """One client's key. The key itself is not kept, only its digest, so that nothing can print it."""

    name: str
    digest: bytes
    requests_per_s: float | None = None


@dataclass(frozen=True)
class KeyRing:
    """All keys of one file."""

    keys: tuple[Key, ...]

    def find(self, secret: bytes) -> Key | None:
        """Return the key that a client sent, in the same time wherever in the file it stands, or if it does not."""
        digest = _digest(secret)
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def parse_keys(text: str, source: str) -> KeyRing:
    """Read `name:key` and `name:key:requests_per_second` lines; `#` begins a comment.

    Raises:
        KeyFileError: a line that is neither, a name or a key that stands twice, or no key at all.
    """
    keys: list[Key] = []
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.split("#", 1)[0].strip()
        if stripped:
            key = _parse_line(stripped, f"{source}, line {number}")
            _require_new(key, keys, f"{source}, line {number}")
            keys.append(key)
    if not keys:
        raise KeyFileError(f"{source}: holds no key; add one with sella-serve key")
    return KeyRing(tuple(keys))


def _parse_line(line: str, place: str) -> Key:
    name, *rest = line.split(":")
    if not NAME.fullmatch(name) or len(rest) not in (1, 2):
        raise KeyFileError(f"{place}: not of the form name:key or name:key:requests_per_second")
    secret = rest[0]
    if not _SECRET.fullmatch(secret):
        raise KeyFileError(
            f"{place}: the key of {name!r} must have 16 to 256 of A-Z a-z 0-9 . _ ~ + / = -; make one with"
            " sella-serve key"
        )
    return Key(name, _digest(secret.encode()), _parse_rate(rest[1], place) if len(rest) == 2 else None)


def _parse_rate(text: str, place: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate <= 1e6:
        raise KeyFileError(f"{place}: {text!r} is no number of requests a second; write one above 0, at most 1000000")
    return rate


def _require_new(key: Key, earlier: Iterable[Key], place: str) -> None:
    for other in earlier:
        if other.name == key.name:
            raise KeyFileError(f"{place}: the name {key.name!r} stands twice; each key needs its own")
        if other.digest == key.digest:
            raise KeyFileError(f"{place}: {key.name!r} has the same key as {other.name!r}; make another")


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
