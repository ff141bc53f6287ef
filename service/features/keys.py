"""The names of everything that is kept in Redis: a bundle's under its id, what all bundles share under `live`."""

from dataclasses import dataclass

# Sixteen hex digits tell bundles apart; the whole id stands in the bundle's meta and is compared at every look-up.
BUNDLE_DIGITS = 16

POINTER = "sella:current"  # the full id of the bundle that is to be served
BUNDLES = "sella:bundles"  # a set: full ids of the bundles that have keys

LIVE = "sella:live:"
DELETED = LIVE + "deleted"  # a hash: user id -> UTC seconds
APPLIED = LIVE + "applied"  # a hash: log id -> the seq of its last entry that was applied
LIKES = LIVE + "likes:"  # + user id, a sorted set: time -> event id, NUL, item id
OUTCOMES = LIVE + "outcomes:"  # + user id, a sorted set: time shown -> name of the impression, state, item id
IMPRESSION = LIVE + "impression:"  # + sha1 of the impression's id: its state
TABLES = LIVE + "tables"  # the number of tables of counts made so far; each table gets the next number


@dataclass(frozen=True, slots=True)
class BundleKeys:
    """The keys of one bundle."""

    bundle_id: str

    @property
    def prefix(self) -> str:
        """What every key of this bundle begins with, and no other bundle's."""
        return f"sella:{self.bundle_id[:BUNDLE_DIGITS]}:"

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
