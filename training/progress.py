"""How far a long task is: a bar on a terminal; elsewhere plain lines, at least one every 30 seconds."""

import time
from collections.abc import Callable
from datetime import timedelta

INTERVAL_S = 30.0

Progress = Callable[[int, int], None]  # (done, total)


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


class TaskProgress:
    """Measures one task, and prints a line when `INTERVAL_S` have passed since the last one.

    Loss and rows a second are those since the last line. Seconds between two steps (an evaluation, a checkpoint) count
    in the time left, and not in the rows a second.

    Args:
        title: the task's name.
        total: how many steps or rows it has in all.
        done: how many of them an earlier process made.
        unit: what is counted.
        say: prints a line.
        draw: shows done, total and a text at every update; a bar.
        clock: seconds, from any start.
    """

    def __init__(
        self,
        title: str,
        total: int,
        done: int = 0,
        *,
        unit: str = "step",
        say: Callable[[str], None] | None = None,
        draw: Callable[[int, int, str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title = title
        self.total = total
        self.done = done
        self._unit = unit
        self._say = say
        self._draw = draw
        self._clock = clock
        self._note = ""
        self._done_before = done
        self._started = self._said = self._step_started = clock()
        self._losses: list[float] = []
        self._rows = 0
        self._busy_s = 0.0

    def begin(self) -> None:
        """Print the first line."""
        self._print(f"{self.title}: {self._unit} {self.done:,} of {self.total:,}")

    def start_step(self) -> None:
        """Begin to measure the seconds of the next update."""
        self._step_started = self._clock()

    def update(self, done: int, *, loss: float | None = None, rows: int = 0) -> None:
        """Count what was done since the last update, and show it if it is time."""
        now = self._clock()
        self._busy_s += now - self._step_started
        self._step_started = now
        self._rows += rows
        self._losses += [] if loss is None else [loss]
        self.done = done
        if self._draw is not None:
            self._draw(done, self.total, ", ".join(filter(None, (*self._figures(), self._note))))
        self.tick()

    def count(self, done: int, total: int) -> None:
        """Count rows; a `Progress` callback."""
        self.total = total
        self.update(done, rows=done - self.done)

    def tick(self) -> None:
        """Print a line if it is time: for work inside a step that may be long."""
        if self._clock() - self._said >= INTERVAL_S:
            self._line(f"{self._seconds_left()} left")

    def note(self, text: str) -> None:
        """Say what was measured last, such as a validation AUC."""
        self._note = text
        self._print(f"{self.title}: {self._unit} {self.done:,}: {text}")

    def end(self) -> None:
        """Print the last line."""
        self._line(f"finished after {_clock_text(self._clock() - self._started)}")

    def _figures(self) -> list[str]:
        loss = [f"loss {sum(self._losses) / len(self._losses):.4f}"] if self._losses else []
        return loss + ([f"{self._rows / self._busy_s:,.1f} rows a second"] if self._rows and self._busy_s else [])

    def _seconds_left(self) -> str:
        made = self.done - self._done_before
        if not made:
            return "unknown time"
        return _clock_text((self._clock() - self._started) / made * (self.total - self.done))

    def _line(self, last: str) -> None:
        self._print(", ".join([f"{self.title}: {self._unit} {self.done:,} of {self.total:,}", *self._figures(), last]))
        # Where no line is printed this is the window of the bar's figures.
        self._said = self._clock()
        self._losses, self._rows, self._busy_s = [], 0, 0.0

    def _print(self, line: str) -> None:
        if self._say is not None:
            self._say(line)


def _clock_text(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
