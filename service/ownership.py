"""Files that root makes for the service: they belong to the user who has to read them."""

import os
import stat
from contextlib import suppress
from pathlib import Path


def give(descriptor: int, path: Path) -> None:
    """Give an open file the owner and mode of the one at `path`, which it will replace.

    Where there is none, and for a file that was just made there, root gives it the folder's owner; its mode stays.
    """
    with suppress(FileNotFoundError):
        there = path.stat()
        if not os.path.samestat(there, os.fstat(descriptor)):
            _own(descriptor, there)
            os.fchmod(descriptor, stat.S_IMODE(there.st_mode))
            return
    _own(descriptor, path.parent.stat())


def _own(descriptor: int, like: os.stat_result) -> None:
    if os.geteuid() == 0:
        os.fchown(descriptor, like.st_uid, like.st_gid)
