"""The rules of the log: what an interaction changes, within the transaction of whoever calls.

The entries are the truth; impressions, likes and counts follow from them, in whatever order they come. An impression is
pending, then negative or positive; positive is final. Its like is its earliest positive event.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from models.features import MAX_OUTCOMES
from models.fusion import Counts
from service.interactions.counts import NEGATIVE, PENDING, POSITIVE, Change, Forgotten, LogChange, Standing
from service.interactions.epochs import Position, begin_epoch, read_epochs
from service.interactions.event import EntryKind, Interaction, LogEntry
from service.interactions.live import (
    EARLIER_LIKES,
    MAX_LIKES,
    Ends,
    KnownOutcome,
    Like,
    LikeRow,
    LiveUser,
    impression_name,
    nothing_stored,
)

Verdict = Literal["accepted", "duplicate", "forgotten"]
CountOf = Literal["user", "item"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

_NEWEST = "ORDER BY timestamp DESC, event_id DESC"
ENTRY = "seq, kind, event_id, user_id, item_id, label, timestamp, request_id, position, impression"


class EventConflictError(Exception):
    """An event id of a user that stands in the log with other content."""

    def __init__(self, index: int, event_id: str) -> None:
        super().__init__(f"event {event_id[:40]!r} is in the log with other content; give a new event an id of its own")
        self.index = index


@dataclass(frozen=True, slots=True)
class Resolved:
    """An impression that has become negative or positive; one that was negative may become positive later."""

    interaction: Interaction
    positive: bool


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a batch, one verdict an interaction in its order; `seq` is the log's last afterwards."""

    verdicts: tuple[Verdict, ...]
    resolved: tuple[Resolved, ...]
    seq: int


class Ledger:
    """One open log, used by one thread. `changes` are the changes since the caller last emptied the list."""

    def __init__(self, connection: sqlite3.Connection, attribution_s: float) -> None:
        self._db = self.connection = connection
        self._attribution_s = attribution_s
        self.changes: list[LogChange] = []
        self.log_id = str(self._value("SELECT value FROM meta WHERE key = 'log_id'"))

    def take(self, batch: Sequence[Interaction], received: float) -> Taken:
        """Append what is new of a batch.

        Raises:
            EventConflictError: an event id stands with other content; the caller rolls back.
        """
        verdicts: list[Verdict] = []
        resolved: list[Resolved] = []
        for index, one in enumerate(batch):
            verdict, impression = self._judge(index, one)
            verdicts.append(verdict)
            if verdict == "accepted":
                resolved += self._append("event", replace(one, impression=impression), received)
        return Taken(tuple(verdicts), tuple(resolved), self.last_seq())

    def expire(self, now: float, limit: int) -> tuple[Resolved, ...]:
        """Make negatives of impressions whose attribution window has passed, the longest waiting first."""
        due = self._db.execute(
            f"SELECT {', '.join('entries.' + name for name in ENTRY.split(', '))} FROM impressions"
            " JOIN entries ON entries.seq = first_seq WHERE state = 0 AND due <= ? ORDER BY due LIMIT ?",
            (now, limit),
        ).fetchall()
        resolved: list[Resolved] = []
        for row in due:
            resolved += self._append("expiry", entry_of(row).interaction, now)
        return tuple(resolved)

    def delete(self, user_id: str, deleted_at: float, received: float) -> int:
        """Forget what a user did up to `deleted_at`, leave a tombstone, and return its seq."""
        tombstone = Interaction("", user_id, "", None, deleted_at)
        # Older tombstones go as well: the newest says all.
        self._db.execute("DELETE FROM entries WHERE user_id = ? AND timestamp <= ?", (user_id, deleted_at))
        seq = self._insert("deletion", tombstone, received)
        self._db.execute(
            "INSERT INTO deletions VALUES (?, ?) ON CONFLICT DO UPDATE SET"
            " deleted_at = max(deleted_at, excluded.deleted_at)",
            (user_id, deleted_at),
        )
        self._rebuild(user_id, seq)
        self._db.execute("INSERT OR REPLACE INTO meta VALUES ('remnants', 'yes')")
        return seq

    def remnants(self) -> bool:
        """Return whether bytes of deleted users may still be in the files, left by an earlier process too."""
        return self._value("SELECT value FROM meta WHERE key = 'remnants'") is not None

    def erased(self) -> None:
        """Remember that nothing of deleted users is left in the files."""
        self._db.execute("DELETE FROM meta WHERE key = 'remnants'")

    def newest_timestamp(self, user_id: str, received_by: float = float("inf")) -> float | None:
        """Return the latest time that any entry of a user names, of those received up to a moment."""
        newest: float | None = self._value(
            "SELECT max(timestamp) FROM entries WHERE user_id = ? AND received <= ?", user_id, received_by
        )
        return newest

    def prune(self, before: float, limit: int) -> int:
        """Drop the oldest entries, received and dated before a moment, with what follows from them; tombstones stay."""
        rows = self._db.execute(
            f"SELECT {ENTRY} FROM entries WHERE kind != 'deletion' AND received < ? AND timestamp < ?"
            " ORDER BY received, seq LIMIT ?",
            (before, before, limit),
        ).fetchall()
        old = [entry_of(row) for row in rows]
        told = [(entry.seq, entry.interaction) for entry in old]
        self._db.executemany(
            "DELETE FROM impressions WHERE impression_id = ? AND last_seq <= ?",
            [(one.impression_id, seq) for seq, one in told],
        )
        self._db.executemany(
            "DELETE FROM likes WHERE user_id = ? AND timestamp = ? AND event_id = ?",
            [(one.user_id, one.timestamp, one.event_id) for _, one in told if one.label],
        )
        self._db.executemany("DELETE FROM entries WHERE seq = ?", [(seq,) for seq, _ in told])
        return len(old)

    def probe(self) -> None:
        """Write something that changes nothing: it fails where an interaction would."""
        self._db.execute("UPDATE size SET entries = entries")

    def read(self, after: int, limit: int) -> list[LogEntry]:
        """Return entries behind a seq, in order."""
        rows = self._db.execute(f"SELECT {ENTRY} FROM entries WHERE seq > ? ORDER BY seq LIMIT ?", (after, limit))
        return [entry_of(row) for row in rows]

    def last_seq(self) -> int:
        """Return the last seq ever given; 0 for none."""
        return int(self._value("SELECT seq FROM sqlite_sequence WHERE name = 'entries'") or 0)

    def position(self) -> Position:
        """Return which log this is, the last seq ever given, and the log's epochs."""
        return Position(self.log_id, self.last_seq(), read_epochs(self._db, self.log_id))

    def begin_epoch(self) -> None:
        """Begin an epoch: the file may be a backup, whose next entries are not those that followed before."""
        begin_epoch(self._db, self.log_id, self.last_seq())

    def last_received(self) -> float:
        """Return when the newest entry was received; 0 for none."""
        return float(self._value("SELECT received FROM entries ORDER BY seq DESC LIMIT 1") or 0.0)

    def entries(self) -> int:
        """Return how many entries the log holds."""
        return int(self._value("SELECT entries FROM size"))

    def deletions(self) -> dict[str, float]:
        """Return when each deleted user was deleted."""
        return dict(self._db.execute("SELECT user_id, deleted_at FROM deletions"))

    def deleted_at(self, user_id: str) -> float | None:
        """Return when a user was deleted."""
        when: float | None = self._value("SELECT deleted_at FROM deletions WHERE user_id = ?", user_id)
        return when

    def deletions_known(self) -> bool:
        """Return whether the deletions at other servers were heard of at least once."""
        return self._value("SELECT value FROM meta WHERE key = 'deletions'") is not None

    def know_deletions(self) -> None:
        """Remember that the deletions at other servers were heard of."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES ('deletions', 'known')")

    def live(self, user_ids: Iterable[str], ends: Ends = nothing_stored) -> dict[str, LiveUser]:
        """Return likes, outcomes and deletion of each user; users with none of them are left out."""
        found = {}
        for user_id in user_ids:
            deleted_at = self.deleted_at(user_id)
            rows = self._db.execute(
                f"SELECT timestamp, event_id, item_id FROM likes WHERE user_id = ? {_NEWEST} LIMIT ?",
                (user_id, MAX_LIKES),
            ).fetchall()
            likes = tuple(Like(*row) for row in reversed(rows))
            earlier, more = ((), 0) if len(rows) < MAX_LIKES else self._earlier(user_id, ends(user_id, deleted_at))
            outcomes = self._outcomes(user_id)
            if likes or outcomes or deleted_at is not None:
                found[user_id] = LiveUser(likes, deleted_at, outcomes, earlier, more)
        return found

    def _earlier(self, user_id: str, end: float) -> tuple[tuple[LikeRow, ...], int]:
        """Return the likes before a user's newest ones that are later than `end`, newest first, and how many are left.

        A search by the primary key: it reads nothing else of the log.
        """
        since = "FROM likes WHERE user_id = ? AND timestamp > ?"
        earlier = self._db.execute(
            f"SELECT timestamp, event_id, item_id {since} {_NEWEST} LIMIT ? OFFSET ?",
            (user_id, end, EARLIER_LIKES, MAX_LIKES),
        ).fetchall()
        if len(earlier) < EARLIER_LIKES:
            return tuple(earlier), 0
        return tuple(earlier), self._value(f"SELECT count(*) {since}", user_id, end) - MAX_LIKES - EARLIER_LIKES

    def _outcomes(self, user_id: str) -> tuple[KnownOutcome, ...]:
        """Return the newest impressions of a user with a known outcome, oldest first."""
        # One part for each known state, merged in order: the pending impressions, which may be many, are never read.
        parts = (
            f"SELECT shown, impression_id, item_id, state FROM impressions WHERE user_id = ?1 AND state = {state}"
            for state in (NEGATIVE, POSITIVE)
        )
        newest = self._db.execute(
            f"{' UNION ALL '.join(parts)} ORDER BY shown DESC, impression_id DESC LIMIT ?2", (user_id, MAX_OUTCOMES)
        ).fetchall()
        return tuple(
            KnownOutcome(shown, impression_name(impression_id), item_id, state == POSITIVE)
            for shown, impression_id, item_id, state in reversed(newest)
        )

    def counts(self, of: CountOf, ids: Iterable[str]) -> dict[str, Counts]:
        """Return the counts of users or items; those never counted are missing."""
        found = {}
        for one in ids:
            row = self._db.execute("SELECT impressions, positives FROM counts WHERE of = ? AND id = ?", (of, one))
            if counted := row.fetchone():
                found[one] = Counts(*counted)
        return found

    def counted_since(self, until: float) -> tuple[dict[str, Counts], dict[str, Counts]]:
        """Return the counts of users and of items, of impressions shown after `until`; reads the whole log."""

        def grouped(column: str) -> dict[str, Counts]:
            rows = self._db.execute(
                f"SELECT {column}, count(*), sum(state = {POSITIVE}) FROM impressions"
                f" WHERE state > {PENDING} AND shown > ? GROUP BY {column}",
                (until,),
            )
            return {one: Counts(impressions, positives) for one, impressions, positives in rows}

        return grouped("user_id"), grouped("item_id")

    def _judge(self, index: int, one: Interaction) -> tuple[Verdict, str | None]:
        """Return what becomes of an interaction, and its impression where the rule does not name it."""
        deleted_at = self._value("SELECT deleted_at FROM deletions WHERE user_id = ?", one.user_id)
        if deleted_at is not None and one.timestamp <= deleted_at:
            return "forgotten", None
        known = self._db.execute(
            f"SELECT {ENTRY} FROM entries WHERE event_id = ? AND user_id = ? AND kind = 'event'",
            (one.event_id, one.user_id),
        ).fetchall()
        if not known:
            return "accepted", self._showing(one)
        before = [entry_of(row).interaction for row in known]
        if any(_content(each) != _content(one) for each in before):
            raise EventConflictError(index, one.event_id)
        labels = {each.label for each in before}
        # A label where there was none is the outcome; none where there is a label says nothing new.
        if one.label is None or one.label in labels:
            return "duplicate", None
        if labels == {None}:
            return "accepted", before[0].impression
        raise EventConflictError(index, one.event_id)

    def _showing(self, one: Interaction) -> str | None:
        """Return the impression that is meant where a client uses a request id again; None for the first.

        An item shown again under the same id, later than an outcome is waited for, is a new impression. An outcome
        belongs to the latest impression that was shown before it.
        """
        if one.request_id is None:
            return None
        shown = self._db.execute(
            "SELECT impression_id, shown FROM impressions WHERE impression_id >= ?1 AND impression_id < ?1 || char(32)",
            (one.impression_id,),
        ).fetchall()
        earlier = [(at, name) for name, at in shown if at <= one.timestamp]
        if not earlier:
            return None
        at, name = max(earlier)
        if one.label is None and one.timestamp > at + self._attribution_s:
            name = f"{one.impression_id}\x1f{one.event_id}"
        return None if name == one.impression_id else name

    def _append(self, kind: EntryKind, one: Interaction, received: float) -> list[Resolved]:
        seq = self._insert(kind, one, received)
        return self._advance(seq, kind, one, received)

    def _insert(self, kind: EntryKind, one: Interaction, received: float) -> int:
        cursor = self._db.execute(
            "INSERT INTO entries"
            " (kind, event_id, user_id, item_id, label, timestamp, request_id, position, received, impression)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                kind,
                one.event_id,
                one.user_id,
                one.item_id,
                one.label,
                one.timestamp,
                one.request_id,
                one.position,
                received,
                one.impression,
            ),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def _advance(
        self, seq: int, kind: EntryKind, one: Interaction, received: float, *, rebuilt_at: int | None = None
    ) -> list[Resolved]:
        """Advance an impression by one entry. If a deletion rebuilds it (`rebuilt_at`), its item's counts stay."""
        unknown = NEGATIVE if kind == "expiry" else PENDING
        arrived = unknown if one.label is None else POSITIVE if one.label else NEGATIVE
        row = self._db.execute(
            "SELECT state, shown FROM impressions WHERE impression_id = ?", (one.impression_id,)
        ).fetchone()
        before, shown = (PENDING, one.timestamp) if row is None else row
        after = max(before, arrived)
        self._db.execute(
            "INSERT INTO impressions VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL) ON CONFLICT DO UPDATE SET"
            " state = excluded.state, shown = min(shown, excluded.shown), last_seq = excluded.last_seq",
            (
                one.impression_id,
                one.user_id,
                one.item_id,
                after,
                one.timestamp,
                received + self._attribution_s,
                seq,
                seq,
            ),
        )
        self._count("user", one.user_id, before, after)
        if rebuilt_at is None:
            self._count("item", one.item_id, before, after)
        stood, stands = Standing(before, shown), Standing(after, min(shown, one.timestamp))
        if stood != stands:
            item_id = one.item_id if rebuilt_at is None else None
            self.changes.append(Change(rebuilt_at or seq, one.user_id, item_id, stood, stands))
        if arrived == POSITIVE:
            self._like(one)
        return [Resolved(one, after == POSITIVE)] if before != after else []

    def _count(self, of: CountOf, one: str, before: int, after: int) -> None:
        impressions, positives = int(before == PENDING != after), int(before != POSITIVE == after)
        if impressions or positives:
            self._db.execute(
                "INSERT INTO counts VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
                " impressions = impressions + excluded.impressions, positives = positives + excluded.positives",
                (of, one, impressions, positives),
            )

    def _like(self, one: Interaction) -> None:
        """Make an impression's earliest positive event its like, whichever came first."""
        [timestamp, event_id] = self._db.execute(
            "SELECT like_timestamp, like_event_id FROM impressions WHERE impression_id = ?", (one.impression_id,)
        ).fetchone()
        if event_id is not None:
            if (timestamp, event_id) <= (one.timestamp, one.event_id):
                return
            self._db.execute(
                "DELETE FROM likes WHERE user_id = ? AND timestamp = ? AND event_id = ?",
                (one.user_id, timestamp, event_id),
            )
        self._db.execute(
            "UPDATE impressions SET like_timestamp = ?, like_event_id = ? WHERE impression_id = ?",
            (one.timestamp, one.event_id, one.impression_id),
        )
        self._db.execute(
            "INSERT OR IGNORE INTO likes VALUES (?, ?, ?, ?)", (one.user_id, one.timestamp, one.event_id, one.item_id)
        )

    def _rebuild(self, user_id: str, tombstone: int) -> None:
        """Derive anew what follows from a user's entries; the items keep what was counted."""
        self.changes.append(Forgotten(tombstone, user_id))
        self._db.execute("DELETE FROM impressions WHERE user_id = ?", (user_id,))
        self._db.execute("DELETE FROM likes WHERE user_id = ?", (user_id,))
        self._db.execute("DELETE FROM counts WHERE of = 'user' AND id = ?", (user_id,))
        left = self._db.execute(
            f"SELECT {ENTRY}, received FROM entries WHERE user_id = ? AND kind != 'deletion' ORDER BY seq", (user_id,)
        ).fetchall()
        for *row, received in left:
            entry = entry_of(row)
            self._advance(entry.seq, entry.kind, entry.interaction, received, rebuilt_at=tombstone)

    def _value(self, query: str, *values: object) -> Any:
        row = self._db.execute(query, values).fetchone()
        return None if row is None else row[0]


def entry_of(row: Sequence[Any]) -> LogEntry:
    """Return the entry of a row of `ENTRY`."""
    seq, kind, event_id, user_id, item_id, label, timestamp, request_id, position, impression = row
    told = None if label is None else bool(label)
    if impression == "":  # of an earlier version, whose impressions without a request had the event's id
        impression = event_id if request_id is None else None
    return LogEntry(
        seq, kind, Interaction(event_id, user_id, item_id, told, timestamp, request_id, position, impression)
    )


def _content(one: Interaction) -> tuple[object, ...]:
    return one.user_id, one.item_id, one.timestamp, one.request_id, one.position
