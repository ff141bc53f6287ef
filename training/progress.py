"""The progress of a long task: a bar on a terminal; otherwise plain lines, at least one every 30 seconds."""

import time
from collections.abc import Callable
from datetime import timedelta

INTERVAL_S = 20.0  # after this a line is due; the running forward may take 10 s more

Progress = Callable[[int, int], None]  # (done, total)


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


class Lines:
    """Prints lines and records the time of the last one; nested tasks share the interval.

    Args:
        write: prints a line.
        clock: seconds, from any start.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._write = write
        self._said = clock()

    @property
    def due(self) -> bool:
        """Whether `INTERVAL_S` have passed since the last line."""
        return self.clock() - self._said >= INTERVAL_S

    def say(self, line: str) -> None:
        """Print a line."""
        self._write(line)
        self._said = self.clock()


class TaskProgress:
    """Measures one task, and prints a line when one is due.

    Loss and rows a second are measured since the last line. The seconds between two steps (an evaluation, a checkpoint)
    count for the time left, but not for the rows a second.

    Args:
        lines: prints.
        title: the task's name.
        total: the number of its steps or rows.
        done: how many of them an earlier process completed.
        unit: what is counted.
        draw: shows done, total and a text at every update; a bar.
    """

    def __init__(
        self,
        lines: Lines,
        title: str,
        total: int,
        done: int = 0,
        *,
        unit: str = "step",
        draw: Callable[[int, int, str], None] | None = None,
    ) -> None:
        self._lines = lines
        self._clock = lines.clock
        self.title = title
        self.total = total
        self.done = done
        self._unit = unit
        self._draw = draw
        self._note = ""
        self._done_before = done
        self._began = self._counted_from = self._step_started = self._updated = self._clock()
        self._losses: list[float] = []
        self._rows = 0
        self._busy_s = 0.0

    def begin(self) -> None:
        """Print the first line."""
        self._lines.say(f"{self.title}: {self._unit} {self.done:,} of {self.total:,}")

    def start_step(self) -> None:
        """Begin to measure the seconds of the next update."""
        self._step_started = self._clock()
        if self.done == self._done_before:
            self._counted_from = self._step_started  # time before the first step says nothing about the time left

    def update(self, done: int, *, loss: float | None = None, rows: int = 0) -> None:
        """Count the work since the last update, and show it if a line is due."""
        now = self._clock()
        self._busy_s += now - self._step_started
        self._step_started = now
        self._rows += rows
        self._losses += [] if loss is None else [loss]
        self.done = done
        self._updated = now
        self._redraw()
        self.tick()

    def count(self, done: int, total: int) -> None:
        """Count rows; a `Progress` callback."""
        self.total = total
        self.update(done, rows=done - self.done)

    def tick(self) -> None:
        """Print a line if one is due; for long work inside a step."""
        if self._lines.due:
            self._line(f"{self._time_left()} left")

    def note(self, text: str) -> None:
        """Print the latest measurement, such as a validation AUC."""
        self._note = text
        self._redraw()
        self._lines.say(f"{self.title}: {self._unit} {self.done:,}: {text}")

    def end(self) -> None:
        """Print the last line."""
        self._line(f"finished after {_duration(self._clock() - self._began)}")

    def _redraw(self) -> None:
        if self._draw is not None:
            self._draw(self.done, self.total, ", ".join([*self._figures(), *filter(None, [self._note])]))

    def _figures(self) -> list[str]:
        loss = [f"loss {sum(self._losses) / len(self._losses):.4f}"] if self._losses else []
        return loss + ([f"{self._rows / self._busy_s:,.1f} rows a second"] if self._rows and self._busy_s else [])

    def _time_left(self) -> str:
        made = self.done - self._done_before
        if not made:
            return "unknown time"
        left = (self._updated - self._counted_from) / made * (self.total - self.done)
        return _duration(max(0.0, left - (self._clock() - self._updated)))

    def _line(self, last: str) -> None:
        how_far = f"{self.title}: {self._unit} {self.done:,} of {self.total:,}"
        self._lines.say(", ".join([how_far, *self._figures(), last]))
        self._losses, self._rows, self._busy_s = [], 0, 0.0


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
