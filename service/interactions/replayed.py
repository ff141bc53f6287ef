"""What the replay reads of the log besides its entries; on a connection of its own, in a thread."""

import sqlite3
from collections.abc import Iterable, Sequence

from service.interactions.counts import NEGATIVE, PENDING, POSITIVE
from service.interactions.event import LogEntry
from service.interactions.ledger import ENTRY, entry_of
from service.interactions.shared import Impression, KnownBefore

_ENTRIES = f"""
SELECT {ENTRY} FROM entries
WHERE user_id = ? AND item_id = ? AND seq >= ? AND seq < ? AND kind != 'deletion'
"""


def late(connection: sqlite3.Connection, entries: Sequence[LogEntry], now: float) -> list[LogEntry]:
    """Return the entries about impressions whose attribution window has passed and that have earlier entries."""
    events = {one.seq: one.interaction.impression_id for one in entries if one.kind == "event"}
    marks = ", ".join("?" * len(events))
    rows = connection.execute(
        f"SELECT impression_id, first_seq FROM impressions WHERE state > {PENDING} AND due <= ?"
        f" AND impression_id IN ({marks})",
        (now, *events.values()),
    )
    first = dict(rows)
    return [one for one in entries if one.seq in events and first.get(events[one.seq], one.seq) < one.seq]


def known_before(connection: sqlite3.Connection, entries: Iterable[LogEntry]) -> dict[int, KnownBefore]:
    """Return by seq what the log knew of the impressions before entries that are not the first about them."""
    found = {}
    for entry in entries:
        one = entry.interaction
        row = connection.execute(
            "SELECT shown, first_seq FROM impressions WHERE impression_id = ?", (one.impression_id,)
        ).fetchone()
        if row is None or row[1] >= entry.seq:
            continue
        shown, first_seq = row
        state, positives = PENDING, []
        told = connection.execute(_ENTRIES, (one.user_id, one.item_id, first_seq, entry.seq))
        for earlier in map(entry_of, told):
            before = earlier.interaction
            if before.impression_id == one.impression_id:
                unknown = NEGATIVE if earlier.kind == "expiry" else PENDING
                arrived = unknown if before.label is None else POSITIVE if before.label else NEGATIVE
                state = max(state, arrived)
                positives += [(before.timestamp, before.event_id)] if arrived == POSITIVE else []
        found[entry.seq] = KnownBefore(state, shown, min(positives, default=None))
    return found


def known_impressions(
    connection: sqlite3.Connection, since: float, after: str, limit: int, until_seq: int
) -> list[Impression]:
    """Return impressions with a known outcome, by id: shown after `since`, first told of at `until_seq` at the latest,
    with an id greater than `after`.
    """
    rows = connection.execute(
        f"SELECT impression_id, user_id, item_id, state = {POSITIVE}, shown FROM impressions"
        f" WHERE impression_id > ? AND state > {PENDING} AND shown > ? AND first_seq <= ?"
        " ORDER BY impression_id LIMIT ?",
        (after, since, until_seq, limit),
    )
    return [Impression(one, user, item, bool(positive), shown) for one, user, item, positive, shown in rows]


def users_with_likes(connection: sqlite3.Connection, received: float, after: str, limit: int) -> list[str]:
    """Return users with a like received after a moment, by id, whose id is greater than `after`."""
    rows = connection.execute(
        "SELECT DISTINCT user_id FROM likes WHERE user_id > ? AND EXISTS (SELECT 1 FROM entries WHERE"
        " entries.user_id = likes.user_id AND label = 1 AND received > ?) ORDER BY user_id LIMIT ?",
        (after, received, limit),
    )
    return [user_id for (user_id,) in rows]


def deletions(connection: sqlite3.Connection, after: str, limit: int) -> list[tuple[str, float]]:
    """Return deleted users and when they were deleted, by id, whose id is greater than `after`."""
    rows = connection.execute(
        "SELECT user_id, deleted_at FROM deletions WHERE user_id > ? ORDER BY user_id LIMIT ?", (after, limit)
    )
    return [(user_id, deleted_at) for user_id, deleted_at in rows]
