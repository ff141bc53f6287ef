"""The names of everything that is kept in Redis, all behind one prefix: a fleet's own."""

import re
from dataclasses import dataclass

# Sixteen hex digits tell bundles apart; the whole id stands in the bundle's meta and is compared at every look-up.
BUNDLE_DIGITS = 16
DEFAULT_PREFIX = "sella"
# Without a colon, no key of one prefix can begin with another prefix and its colon; without *, ?, [ and \, a scan for
# the keys of one prefix finds no others.
KEY_PREFIX = "[A-Za-z0-9._-]{1,64}"


@dataclass(frozen=True, slots=True)
class BundleKeys:
    """The keys of one bundle."""

    bundle_id: str
    root: str = DEFAULT_PREFIX

    @property
    def prefix(self) -> str:
        """What every key of this bundle begins with, and no other bundle's."""
        return f"{self.root}:{self.bundle_id[:BUNDLE_DIGITS]}:"

    @property
    def meta(self) -> str:
        """A hash: what was published and how far."""
        return self.prefix + "meta"

    @property
    def counts(self) -> str:
        """Prefix of the keys of live counts; the number of the bundle's table, which meta has, follows."""
        return self.prefix + "n:"

    @property
    def items(self) -> str:
        """What an item's id is appended to."""
        return self.prefix + "i:"

    @property
    def users(self) -> str:
        """What a user's id is appended to."""
        return self.prefix + "u:"


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one fleet: those that all its bundles share, and each bundle's."""

    root: str = DEFAULT_PREFIX

    def __post_init__(self) -> None:
        if not re.fullmatch(KEY_PREFIX, self.root):
            raise ValueError(f"{self.root[:80]!r} is no key prefix; give 1 to 64 of A-Z a-z 0-9 . _ -")

    def bundle(self, bundle_id: str) -> BundleKeys:
        """Return the keys of one bundle."""
        return BundleKeys(bundle_id, self.root)

    @property
    def pointer(self) -> str:
        """The full id of the bundle that is to be served."""
        return f"{self.root}:current"

    @property
    def bundles(self) -> str:
        """A set: full ids of the bundles that have keys."""
        return f"{self.root}:bundles"

    @property
    def serving(self) -> str:
        """A sorted set: until when (UTC seconds) each server serves a bundle -> bundle id, colon, server."""
        return f"{self.root}:serving"

    @property
    def deleted(self) -> str:
        """A hash: user id -> UTC seconds."""
        return f"{self.root}:live:deleted"

    @property
    def deletions(self) -> str:
        """A sorted set: a number that grows with each deletion -> user id. Servers read on from the last."""
        return f"{self.root}:live:deletions"

    @property
    def applied(self) -> str:
        """A hash: epoch of a log -> the seq of its last entry that was applied."""
        return f"{self.root}:live:applied"

    @property
    def likes(self) -> str:
        """+ user id, a sorted set: time -> event id, NUL, item id."""
        return f"{self.root}:live:likes:"

    @property
    def outcomes(self) -> str:
        """+ user id, a sorted set: time shown -> name of the impression, state, item id."""
        return f"{self.root}:live:outcomes:"

    @property
    def impression(self) -> str:
        """+ sha1 of the impression's id: its state."""
        return f"{self.root}:live:impression:"

    @property
    def tables(self) -> str:
        """The number of tables of counts made so far; each table gets the next number."""
        return f"{self.root}:live:tables"

    @property
    def evicted(self) -> str:
        """What is known of keys that Redis has evicted: the run of Redis, and how many it had evicted."""
        return f"{self.root}:live:evicted"
