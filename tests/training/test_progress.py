import io
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from training.config import Config, ScheduleConfig
from training.loop import StageLoop
from training.progress import Lines, TaskProgress
from training.run import Run


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def lines(said: list[str], clock: Clock) -> Lines:
    return Lines(said.append, clock)


def step(progress: TaskProgress, clock: Clock, seconds: float, **figures: float) -> None:
    progress.start_step()
    clock.now += seconds
    progress.update(progress.done + 1, **figures)  # type: ignore[arg-type]


def test_a_line_has_step_loss_rows_a_second_and_time_left(lines: Lines, said: list[str], clock: Clock) -> None:
    progress = TaskProgress(lines, "adapt", 1200)
    progress.begin()
    for loss in (0.9, 0.8, 0.7, 0.6):
        step(progress, clock, 5, loss=loss, rows=64)
    assert said == ["adapt: step 0 of 1,200", "adapt: step 4 of 1,200, loss 0.7500, 12.8 rows a second, 1:39:40 left"]
    for loss in (0.5, 0.3):
        step(progress, clock, 5, loss=loss, rows=32)
    progress.end()
    assert said[2:] == ["adapt: step 6 of 1,200, loss 0.4000, 6.4 rows a second, finished after 0:00:30"]


def test_what_lies_between_two_steps_is_not_in_the_rows_a_second_but_in_the_time_left(
    lines: Lines, said: list[str], clock: Clock
) -> None:
    progress = TaskProgress(lines, "adapt", 10)
    clock.now += 500  # an evaluation before the first step says nothing of the time left
    step(progress, clock, 2, loss=0.5, rows=64)
    clock.now += 18
    step(progress, clock, 2, loss=0.5, rows=64)
    assert said[-1] == "adapt: step 2 of 10, loss 0.5000, 32.0 rows a second, 0:01:28 left"


def test_a_resumed_task_does_not_count_what_an_earlier_process_made(
    lines: Lines, said: list[str], clock: Clock
) -> None:
    progress = TaskProgress(lines, "adapt", 110, done=100)
    step(progress, clock, 30)
    assert said == ["adapt: step 101 of 110, 0:04:30 left"]


def test_a_long_step_prints_lines_while_it_lasts(lines: Lines, said: list[str], clock: Clock) -> None:
    progress = TaskProgress(lines, "adapt", 3)
    progress.start_step()
    for _ in range(9):
        clock.now += 10
        progress.tick()
    assert said == ["adapt: step 0 of 3, unknown time left"] * 4


def test_tasks_inside_each_other_leave_no_gap_of_more_than_30_seconds(
    clock: Clock,
) -> None:
    at: list[float] = []
    lines = Lines(lambda line: at.append(clock.now), clock)
    stage = TaskProgress(lines, "adapt", 100)
    stage.begin()
    for _ in range(5):
        for _ in range(3):
            step(stage, clock, 6)
        scoring = TaskProgress(lines, "scoring", 70, unit="row")
        for done in range(10, 80, 10):
            clock.now += 9
            scoring.count(done, 70)
    at.append(clock.now)
    assert max(later - earlier for earlier, later in itertools.pairwise(at)) <= 30


def test_rows_are_counted_by_a_callback(lines: Lines, said: list[str], clock: Clock) -> None:
    progress = TaskProgress(lines, "scoring valid", 0, unit="row")
    for done in (64, 128, 192):
        clock.now += 10
        progress.count(done, 640)
    assert said == ["scoring valid: row 128 of 640, 6.4 rows a second, 0:01:20 left"]


def test_a_bar_is_given_loss_and_rows_a_second_at_every_step(lines: Lines, clock: Clock) -> None:
    drawn: list[tuple[int, int, str]] = []
    progress = TaskProgress(lines, "adapt", 3, draw=lambda *one: drawn.append(one))
    step(progress, clock, 2, loss=0.5, rows=64)
    progress.note("valid auc 0.6000, best 0.6000")
    step(progress, clock, 2, loss=0.7, rows=32)
    assert drawn == [
        (1, 3, "loss 0.5000, 32.0 rows a second"),
        (1, 3, "loss 0.5000, 32.0 rows a second, valid auc 0.6000, best 0.6000"),
        (2, 3, "loss 0.6000, 24.0 rows a second, valid auc 0.6000, best 0.6000"),
    ]


@pytest.fixture
def run_on(tmp_path: Path, clock: Clock) -> Callable[[Console], Run]:
    def make(console: Console) -> Run:
        return Run(tmp_path, Config(), Accelerator(cpu=True), console, clock)

    return make


def train(run: Run, clock: Clock) -> None:
    """Train a stage of four steps, 15 seconds and three rows each."""
    weight = nn.Parameter(torch.ones(3))
    loop = StageLoop[torch.Tensor](
        run,
        "toy",
        [({"weight": weight}, 1.0, 0.0)],
        ScheduleConfig(epochs=1, learning_rate=1e-9, evaluations_per_epoch=1),
        lambda rng: [torch.full((3,), 0.5)] * 4,
        lambda: {"auc": 0.5},
    )
    for rows_3 in loop.steps():
        clock.now += 15
        loop.backward((weight * rows_3).sum())


def test_a_stage_prints_its_lines_where_there_is_no_terminal(run_on: Callable[[Console], Run], clock: Clock) -> None:
    out = io.StringIO()
    train(run_on(Console(file=out, width=20)), clock)
    assert out.getvalue().splitlines() == [
        "toy: step 0 of 4",
        "toy: step 1 of 4, loss 1.5000, 0.2 rows a second, 0:00:30 left",
        "toy: step 3 of 4, loss 1.5000, 0.2 rows a second, 0:00:00 left",
        "toy: step 4: valid auc 0.5000, best 0.5000",
        "toy: step 4 of 4, loss 1.5000, 0.2 rows a second, finished after 0:01:00",
    ]


def test_a_stage_draws_a_bar_with_loss_and_rows_a_second_on_a_terminal(
    run_on: Callable[[Console], Run], clock: Clock
) -> None:
    out = io.StringIO()
    train(run_on(Console(file=out, width=160, force_terminal=True)), clock)
    assert "4/4" in out.getvalue() and "loss 1.5000, 0.2 rows a second, valid auc 0.5000" in out.getvalue()
    assert "toy: step" not in out.getvalue()
