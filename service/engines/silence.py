"""How long an engine that answers many jobs at once has been silent while somebody waited."""

import asyncio
import time
from collections.abc import Callable


class Silence:
    """Tells when an engine has answered nothing for too long.

    Any answer shows life. Jobs that are given up show nothing: their clients' deadlines are shorter than the limit, so
    an engine that hangs would never be found out if each began anew. Time in which nobody waits does not count.
    """

    def __init__(self, limit_s: float, on_hang: Callable[[str], None]) -> None:
        self._limit_s = limit_s
        self._on_hang = on_hang
        self._waiting = 0
        self._silent_s = 0.0  # before `_since`
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def began(self) -> None:
        """Somebody waits."""
        if not self._waiting:
            self._listen()
        self._waiting += 1

    def ended(self, *, answered: bool) -> None:
        """Somebody waits no longer."""
        self._waiting -= 1
        if answered:
            self._silent_s = 0.0
        else:
            self._silent_s += time.monotonic() - self._since
        self._stop()
        if self._waiting:
            self._listen()

    def _listen(self) -> None:
        self._since = time.monotonic()
        reason = f"no answer within {self._limit_s:g} s"
        left = max(0.0, self._limit_s - self._silent_s)
        self._timer = asyncio.get_running_loop().call_later(left, self._on_hang, reason)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
