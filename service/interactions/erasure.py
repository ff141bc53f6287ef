"""Erases what deleted rows have left in the log's file, a few pages at a time, so that writing goes on.

SQLite overwrites a row that is deleted (`secure_delete`), but not the copies that it makes when it moves rows between
the pages of a tree: they stay in the unused middle of a page, between the page's index and its rows. `VACUUM` would
write the whole file anew and hold every write until then. Nothing reads the middle of a page, so it is overwritten
here, in the file itself (https://www.sqlite.org/fileformat2.html#b_tree_pages).
"""

import os
import sqlite3
import struct
import time

STEP_S = 0.015  # how long writes may wait for one step; then they go first
STEP_PAGES = 256  # read at once, a megabyte

_HEADS = {2: 12, 5: 12, 10: 8, 13: 8}  # bytes of a page's head by its first byte, the kind; other pages are no trees
_FILE_HEAD = 100  # bytes before the head of the first page


class Erasure:
    """Goes through the file of one connection, the only one that writes it, in the thread of that connection.

    A page in the file is the only copy of its bytes while nothing is in the write-ahead file and nothing in the
    connection's own memory; a step that cannot have it so does nothing.
    """

    def __init__(self, connection: sqlite3.Connection, descriptor: int) -> None:
        """`descriptor` is the file's, open for writing, and is not closed here."""
        self._db = connection
        self._descriptor = descriptor
        [self._page_size] = connection.execute("PRAGMA page_size").fetchone()
        [reserved] = os.pread(descriptor, 1, 20) or b"\0"
        self._usable = self._page_size - reserved
        self._next = self._left = 0

    def begin(self) -> None:
        """Go through the whole file from here on: rows were deleted."""
        self._left = self._pages()

    def step(self) -> bool:
        """Clean some pages; return whether none is left. A reader of an older state of the log makes it wait.

        Raises:
            sqlite3.Error, OSError: the disk fails; the page may be tried again.
        """
        [timeout] = self._db.execute("PRAGMA busy_timeout").fetchone()
        self._db.execute("PRAGMA busy_timeout = 0")
        try:
            return self._step()
        finally:
            self._db.execute(f"PRAGMA busy_timeout = {timeout}")

    def _step(self) -> bool:
        version = self._version()
        [busy, *_] = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            return False
        self._db.execute("PRAGMA shrink_memory")  # drops the pages that the connection keeps
        self._db.execute("BEGIN IMMEDIATE")  # against a program beside the service
        try:
            if self._version() == version:
                self._clean()
        finally:
            self._db.execute("ROLLBACK")
            self._db.execute("PRAGMA shrink_memory")
        return self._left <= 0

    def _clean(self) -> None:
        end, total = time.monotonic() + STEP_S, self._pages()
        while self._left > 0 and time.monotonic() < end:
            if self._next >= total:
                self._next = 0
            count = min(STEP_PAGES, total - self._next)
            first = self._next * self._page_size
            pages = os.pread(self._descriptor, count * self._page_size, first)
            for place in range(0, len(pages), self._page_size):
                begin, until = self._unused(pages, place, first + place == 0)
                if pages[begin:until].strip(b"\0"):
                    os.pwrite(self._descriptor, bytes(until - begin), first + begin)
            self._next += count
            self._left -= count
        os.fdatasync(self._descriptor)

    def _unused(self, pages: bytes, place: int, first: bool) -> tuple[int, int]:
        """Return where the unused middle of the page at `place` begins and ends; equal where there is none."""
        head = place + _FILE_HEAD * first
        kind, _, cells, rows = struct.unpack_from(">BHHH", pages, head)
        begin = head + _HEADS.get(kind, 0) + 2 * cells
        until = place + (rows or 65_536)
        if kind not in _HEADS or not begin <= until <= place + self._usable:
            return place, place
        return begin, until

    def _pages(self) -> int:
        return os.fstat(self._descriptor).st_size // int(self._page_size)

    def _version(self) -> int:
        [version] = self._db.execute("PRAGMA data_version").fetchone()
        return int(version)
