"""What every stage's loop shares: schedule, several processes, checks, evaluation, checkpoints.

A stage writes its own forward and loss; `StageLoop` is what stands around them. Nothing depends on a global random
state: the order of an epoch and the noise of a step are functions of (seed, stage, step), so a run that was killed
and resumed from any checkpoint takes the same steps as one that was not.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from models.memory import release_freed_memory
from training.config import ScheduleConfig
from training.prediction import worth
from training.progress import TaskProgress
from training.run import Run, read_tensors, write_tensors

Step = TypeVar("Step")
RELEASE_SECONDS = 20.0  # how often freed memory goes back to the system, which then has to clear it for the next step


class TrainingError(RuntimeError):
    """Training that cannot go on; the message names the stage and the step."""


def derived_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends on every part and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 1


class StageLoop(Generic[Step]):
    """Iterates over a stage's steps.

    Args:
        run: the run.
        name: the stage's name; its checkpoint is `<name>.safetensors` in the run folder.
        rates: parameter groups as {name: parameter} with a learning rate factor and a weight decay each.
        schedule: how to step.
        plan: the steps of an epoch, from a seeded generator; the same in every process.
        evaluate: returns validation figures; the parameters with the highest `objective` are kept.
        objective: which of the figures that is.
        serial: whether the main process takes the whole stage alone.
        rows: returns the number of rows of a step, for the progress.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        rates: list[tuple[dict[str, nn.Parameter], float, float]],
        schedule: ScheduleConfig,
        plan: Callable[[np.random.Generator], list[Step]],
        evaluate: Callable[[], Mapping[str, float | None]],
        objective: str = "auc",
        *,
        serial: bool = False,
        rows: Callable[[Any], int] = len,
    ) -> None:
        self.run = run
        self.name = name
        self.schedule = schedule
        self.parameters = {key: parameter for group, _, _ in rates for key, parameter in group.items()}
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(group.values()), "lr": 0.0, "factor": factor, "weight_decay": decay}
                for group, factor, decay in rates
            ],
            betas=(0.9, schedule.second_moment),
        )
        self.step = 0
        self.evaluations: list[dict[str, float | None]] = []
        self.best: dict[str, Tensor] = {}
        self._plan = plan
        self._evaluate = evaluate
        self._objective = objective
        self._serial = serial
        self._rows = rows
        self._progress: TaskProgress | None = None
        self._loss = torch.zeros((), device="cpu" if serial else run.device)
        self._path = run.folder / f"{name}.safetensors"
        self._finished = False

    def restore(self) -> bool:
        """Take up the checkpoint, if there is one; return whether the stage is already finished."""
        if not self._path.exists():
            return False
        tensors, state = read_tensors(self._path)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"now/{name}"])
        self.best = {name.removeprefix("best/"): one for name, one in tensors.items() if name.startswith("best/")}
        self._load_optimizer(tensors)
        self.step, self.evaluations, self._finished = state["step"], state["evaluations"], state["finished"]
        return self._finished

    def steps(self) -> Iterator[Step]:
        """Yield every step left; between two of them gradients are applied, checked, evaluated and saved."""
        # An epoch of small data counts as long enough to make the least number of steps, and is evaluated as seldom.
        per_epoch = max(len(self._epoch(0)), math.ceil(self.schedule.min_steps / self.schedule.epochs))
        total = max(1, round(self.schedule.epochs * per_epoch))
        if self.schedule.max_steps is not None and self.schedule.max_steps < total:
            total, per_epoch = self.schedule.max_steps, math.ceil(self.schedule.max_steps / self.schedule.epochs)
        every = max(1, per_epoch // self.schedule.evaluations_per_epoch)
        with self.run.progress(self.name, total, self.step) as progress, self._charts() as writer:
            self._progress = progress
            if not self.evaluations:
                self._record()
            saved = released = time.monotonic()
            for step in self._remaining(total):
                torch.manual_seed(derived_seed(self.run.config.seed, self.name, self.step))
                self._set_rate(total)
                progress.start_step()
                yield step
                loss = self._apply(writer)
                self.step += 1
                progress.update(self.step, loss=loss, rows=self._rows(step))
                if self.step % every == 0 or self.step == total:
                    self._record(writer)
                    self._show(progress)
                if self._patience_is_spent():
                    break
                if time.monotonic() - saved > self.run.config.checkpoint_seconds:
                    self.save()
                    saved = time.monotonic()
                if time.monotonic() - released > RELEASE_SECONDS:
                    release_freed_memory()
                    released = time.monotonic()
        self._finished = True
        self.save()

    def backward(self, loss: Tensor) -> None:
        """Add a part of the step's loss; a step may have several parts, over several processes."""
        loss.backward()
        self._loss += loss.detach()
        if self._progress is not None:
            self._progress.tick()

    def keep_best(self) -> None:
        """Put the best parameters in place."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.best[name])

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if not self.run.is_main:
            return
        tensors: dict[str, Tensor] = {f"now/{name}": parameter for name, parameter in self.parameters.items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{name}/{key}"] = value
        state = {"step": self.step, "evaluations": self.evaluations, "finished": self._finished}
        write_tensors(self._path, tensors, state)

    def _epoch(self, epoch: int) -> list[Step]:
        return self._plan(np.random.default_rng(derived_seed(self.run.config.seed, self.name, "epoch", epoch)))

    def _remaining(self, total: int) -> Iterator[Step]:
        start = 0
        for epoch in count():
            steps = self._epoch(epoch)
            for step in steps[max(0, self.step - start) :]:
                if self.step >= total:
                    return
                yield step
            start += len(steps)

    def _set_rate(self, total: int) -> None:
        warmup = max(1.0, self.schedule.warmup * total)
        share = min(1.0, (self.step + 1) / warmup) * (total - self.step) / total
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate * group["factor"] * share

    def _charts(self) -> AbstractContextManager[SummaryWriter | None]:
        """Return a writer of TensorBoard curves, in the main process alone."""
        if not self.run.is_main:
            return nullcontext()
        return SummaryWriter(str(self.run.folder / "tensorboard" / self.name), purge_step=self.step)

    def _apply(self, writer: SummaryWriter | None) -> float:
        loss = self._loss if self._serial else self._gather_gradients()
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), self.schedule.gradient_norm)
        if not (math.isfinite(norm) and math.isfinite(loss)):
            raise TrainingError(
                f"{self.name}, step {self.step}: loss {float(loss)}, gradient norm {float(norm)}; not finite. The last"
                " checkpoint is intact; lower the learning rate or train in float32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if writer is not None:
            writer.add_scalar("loss", float(loss), self.step)
            writer.add_scalar("gradient_norm", float(norm), self.step)
        self._loss = torch.zeros_like(self._loss)
        return float(loss)

    def _gather_gradients(self) -> Tensor:
        """Sum gradients over the processes, also where this one had no part of the step; returns the summed loss."""
        if self.run.accelerator.num_processes > 1:
            for parameter in self.parameters.values():
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.run.sum(own)
        return self.run.sum(self._loss)

    def _record(self, writer: SummaryWriter | None = None) -> None:
        figures: dict[str, float | None] = {"step": float(self.step), **self._evaluate()}
        value = worth(figures, self._objective)
        if not math.isfinite(value):
            raise TrainingError(
                f"{self.name}, step {self.step}: the scores of valid are not finite; lower the learning rate or train"
                " in float32"
            )
        better = all(value > earlier for earlier in self._history())
        self.evaluations.append(figures)
        if better:
            self.best = {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}
        if writer is not None:
            for key, figure in figures.items():
                if figure is not None:
                    writer.add_scalar(f"valid/{key}", figure, self.step)

    def _patience_is_spent(self) -> bool:
        values = self._history()
        return len(values) - 1 - int(np.argmax(values)) >= self.schedule.patience

    def _history(self) -> list[float]:
        return [worth(figures, self._objective) for figures in self.evaluations]

    def _show(self, progress: TaskProgress) -> None:
        values = self._history()
        if self.evaluations[-1][self._objective] is None:
            progress.note(
                f"valid {self._objective} undefined: one class; log-loss {-values[-1]:.4f}, best {-max(values):.4f}"
            )
        else:
            progress.note(f"valid {self._objective} {values[-1]:.4f}, best {max(values):.4f}")

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            prefix = f"optimizer/{name}/"
            found = {key.removeprefix(prefix): one for key, one in tensors.items() if key.startswith(prefix)}
            if found:
                # AdamW keeps its step counter on the CPU and its moments beside the parameter.
                self.optimizer.state[parameter] = {
                    key: one if key == "step" else one.to(parameter.device) for key, one in found.items()
                }
