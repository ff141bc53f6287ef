"""Epochs of a log: the entries that one opening of the file has written.

A backup that is put back continues with the seqs that the lost entries had. So a seq alone does not say which entry is
meant; epoch and seq do. Each opening begins an epoch with a new random id, before its first entry. Two copies of a log
have the epochs before the copy in common, each up to the seq at which the copy's next epoch began.
"""

import json
import sqlite3
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Epoch(NamedTuple):
    """An epoch has the entries behind `start`, up to the start of the next epoch."""

    id: str
    start: int


class Place(NamedTuple):
    """Where to go on: behind `seq`, in the epoch with this number, whose last entry is at most at `end`."""

    number: int
    seq: int
    end: int


@dataclass(frozen=True, slots=True)
class Position:
    """Which log this is, the last seq that it has given, and its epochs, the oldest first."""

    log_id: str
    seq: int
    epochs: tuple[Epoch, ...] = field(compare=False)

    def places(self, applied: Sequence[int]) -> list[Place]:
        """Return what is left to apply, in order, if `applied` has the last seq applied of each epoch."""
        ends = [one.start for one in self.epochs[1:]] + [self.seq]
        return [
            Place(number, max(told, one.start), end)
            for number, (one, told, end) in enumerate(zip(self.epochs, applied, ends, strict=True))
            if max(told, one.start) < end
        ]


def read_epochs(connection: sqlite3.Connection, log_id: str) -> tuple[Epoch, ...]:
    """Return a log's epochs; of one that no version with epochs has opened, the only one, named like the log."""
    row = connection.execute("SELECT value FROM meta WHERE key = 'epochs'").fetchone()
    return (Epoch(log_id, 0),) if row is None else tuple(Epoch(*one) for one in json.loads(row[0]))


def begin_epoch(connection: sqlite3.Connection, log_id: str, last_seq: int) -> None:
    """Begin an epoch, within the caller's transaction; those without entries leave the list."""
    [stored] = connection.execute("SELECT count(*) FROM meta WHERE key = 'epochs'").fetchone()
    [first_seq] = connection.execute("SELECT min(seq) FROM entries").fetchone()
    epochs = list(read_epochs(connection, log_id))
    ends = [one.start for one in epochs[1:]] + [last_seq]
    kept = [one for one, end in zip(epochs, ends, strict=True) if one.start < end and end >= (first_seq or 0)]
    # A new log's first epoch is named like the log, as it is for a log that an earlier version wrote.
    new = Epoch(uuid.uuid4().hex if stored or last_seq else log_id, last_seq)
    connection.execute("INSERT OR REPLACE INTO meta VALUES ('epochs', ?)", (json.dumps([*kept, new]),))
