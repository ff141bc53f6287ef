"""Time as the log needs it: the wall clock for what clients say, and seconds that no setting of it can move."""

import time
from collections.abc import Callable


class Clock:
    """A wall clock, and a steady one that starts from it and then only counts.

    How long an impression has waited is counted by `steady`: a wall clock that is set back must not make an
    outcome come twice as late, and one that is set ahead must not make every impression a negative at once.
    """

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._began = monotonic()
        self._base = wall()

    def wall(self) -> float:
        """Return UTC seconds as the machine has them now."""
        return self._wall()

    def steady(self) -> float:
        """Return UTC seconds that never go back and never jump while the process lives."""
        return self._base + self._monotonic() - self._began

    def not_before(self, moment: float) -> None:
        """Go on from `moment` at the earliest: the log's last entry, which an earlier process may have dated later."""
        self._base += max(0.0, moment - self.steady())
