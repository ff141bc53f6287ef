"""A key file that is read again when it changes, so that keys are rotated without a restart."""

import os
import stat
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import structlog

from service.access.keys import KeyFileError, KeyRing, parse_keys

CHECK_S = 1.0
MAX_BYTES = 1_048_576  # a mistaken path must not be read into memory whole

# What changes when a file is written or replaced: device and inode, modification and status change in ns, size.
Signature = tuple[int, int, int, int, int]


class KeyFile:
    """The keys of a file as it is now.

    A file that cannot be read or understood leaves the keys as they were: a typing error locks nobody out and lets
    nobody in. It is an error in the log, once for each change of the file.

    Raises:
        KeyFileError: at the start, where there are no earlier keys to keep.
    """

    def __init__(
        self, path: Path, log: structlog.stdlib.BoundLogger, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._log = log
        self._clock = clock
        self._seen: Signature | None
        self._seen, self._ring = self._read()
        self._checked = clock()
        self._watched = False

    def watch(self) -> threading.Thread:
        """Look at the file each second from now on, in a thread of its own: a disk may not answer.

        The thread ends with this object, and never keeps the process from ending.
        """
        self._watched = True
        thread = threading.Thread(target=_watch, args=(weakref.ref(self),), name="keys", daemon=True)
        thread.start()
        return thread

    def ring(self) -> KeyRing:
        """Return the keys. If nobody watches the file this looks at it, once a second at most."""
        if not self._watched and self._clock() - self._checked >= CHECK_S:
            self.follow()
        return self._ring

    def follow(self) -> None:
        """Look at the file: one system call, no read unless it changed."""
        self._checked = self._clock()
        signature = self._signature()
        if signature == self._seen:
            return
        try:
            self._seen, self._ring = self._read()
        except KeyFileError as error:
            self._seen = signature
            self._log.error("keys_refused", reason=str(error), kept=len(self._ring.keys))
        else:
            self._log.info("keys_changed", file=str(self._path), names=[key.name for key in self._ring.keys])

    def _signature(self) -> Signature | None:
        try:
            return _signature(self._path.stat())
        except OSError:
            return None

    def _read(self) -> tuple[Signature, KeyRing]:
        status, data = read_keys(self._path)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise KeyFileError(f"{self._path}: not UTF-8 text at byte {error.start}") from error
        ring = parse_keys(text, str(self._path))
        if stat.S_IMODE(status.st_mode) & stat.S_IROTH:
            self._log.warning("keys_readable_by_all", file=str(self._path), remedy=f"chmod o-r {self._path}")
        return _signature(status), ring


def read_keys(path: Path) -> tuple[os.stat_result, bytes]:
    """Read a key file, which is a regular file: a pipe would make the reader wait for a writer.

    Raises:
        KeyFileError: it cannot be read, is something else or too long.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise KeyFileError(f"{path}: is no regular file; put the keys into one")
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise KeyFileError(f"{path}: longer than {MAX_BYTES} bytes; is it a key file?")
    return status, data


def _watch(file: "weakref.ref[KeyFile]") -> None:
    while (there := file()) is not None:
        there.follow()
        del there  # or the thread would keep it alive
        time.sleep(CHECK_S)


def _signature(status: os.stat_result) -> Signature:
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size
