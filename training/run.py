"""A training run: where its files are, which processes take part, and how it reports.

The run folder is the memory of a `fit`: every finished stage leaves its result there, and a stage under way its
checkpoint, so that a killed run resumes where it was.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.config import Config
from training.progress import Lines, TaskProgress


class RunError(ValueError):
    """A run folder that cannot be used; the message says why and what to do."""


def code_version() -> dict[str, str]:
    """Return what a run must not mix: the versions of sella and of the libraries, and a hash of sella's source."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(one for package in ("models", "training") for one in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}:{hashlib.sha256(path.read_bytes()).hexdigest()};".encode())
    versions = {name: version(name) for name in ("sella", "torch", "transformers", "peft")}
    return versions | {"source": digest.hexdigest()}


Shared = TypeVar("Shared", list[Any], Tensor)


class Run:
    """One `fit`, possibly one process of several."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        accelerator: Accelerator,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.config = config
        self.accelerator = accelerator
        self.console = console
        self.lines = Lines(self._write_line, clock)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def is_main(self) -> bool:
        """Whether this process writes and reports."""
        return bool(self.accelerator.is_main_process)

    @property
    def claimed(self) -> bool:
        """Whether a `fit` has begun in the run folder."""
        return (self.folder / "run.json").exists()

    def check(self, identity: dict[str, Any], *, resume: bool, finished: bool = False) -> None:
        """Refuse a run folder that `claim` would refuse; write nothing. A finished run may be of any code.

        Raises:
            RunError: the folder holds another run, or it holds a run and `resume` is False.
        """
        if not self.is_main or not self.claimed:  # the main process may claim it before another process looks
            return
        found = json.loads((self.folder / "run.json").read_text())
        keys = (identity.keys() | found.keys()) - ({"code"} if finished else set())
        changed = sorted(key for key in keys if identity.get(key) != found.get(key))
        if not resume:
            raise RunError(f"{self.folder} holds an earlier run; add --resume to go on with it or remove it")
        if changed:
            raise RunError(
                f"{self.folder} is a run with another {', '.join(changed)}; remove it to start anew"
                + (", or go on with the sella and the libraries that began it" if changed == ["code"] else "")
            )

    def claim(self, identity: dict[str, Any], *, resume: bool) -> None:
        """Take the run folder for a `fit` of this identity (data, configuration, backbone, code).

        Raises:
            RunError: it holds another run, or one that was not asked to resume.
        """
        if self.is_main:
            self.check(identity, resume=resume)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "run.json", identity)
        self.accelerator.wait_for_everyone()

    def pin(self, name: str, found: dict[str, Any]) -> None:
        """Write `found` to `name`.json when the run begins; in a resumed run it must be the same.

        Raises:
            RunError: it differs.
        """
        path = self.folder / f"{name}.json"
        if path.exists() and json.loads(path.read_text()) != found:
            raise RunError(f"{self.folder} began with another {name}, which has changed since; remove it to start anew")
        self.accelerator.wait_for_everyone()  # no process writes before all processes have looked
        if self.is_main and not path.exists():
            write_json(path, found)

    def say(self, text: str) -> None:
        """Print one line, from the main process alone."""
        if self.is_main:
            self.console.print(text)

    def share(self, values: Shared) -> Shared:
        """Return this process's share of a list, or of a tensor's rows, that all processes hold."""
        return values[self.accelerator.process_index :: self.accelerator.num_processes]

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes."""
        if self.accelerator.num_processes == 1:
            return tensor
        summed: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return summed

    @contextmanager
    def progress(self, title: str, total: int, done: int = 0, *, unit: str = "step") -> Iterator[TaskProgress]:
        """Show a task of the main process: a bar on a terminal, otherwise lines from its start to its end."""
        if not (self.is_main and self.console.is_terminal):
            progress = TaskProgress(self.lines, title, total, done, unit=unit)
            progress.begin()
            yield progress
            progress.end()
            return
        columns = (
            TextColumn(f"{title:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Bars(*columns, console=self.console) as bars:
            task = bars.add_task("", total=total, completed=done)

            def draw(done: int, total: int, text: str) -> None:
                bars.update(task, completed=done, total=total, description=text)

            yield TaskProgress(self.lines, title, total, done, unit=unit, draw=draw)

    def inner_progress(self, title: str, total: int) -> TaskProgress:
        """Report the rows of a part of a task, such as a stage's evaluation: in lines only, without a bar."""
        return TaskProgress(self.lines, title, total, unit="row")

    def _write_line(self, line: str) -> None:
        if self.is_main and not self.console.is_terminal:
            self.console.print(line, soft_wrap=True, markup=False, highlight=False)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON so that a reader finds the old file or the new one, whole."""
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    scratch.rename(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], state: dict[str, Any] | None = None) -> None:
    """Write tensors and a JSON state as one safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    clean = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(clean, scratch, metadata={"state": json.dumps(state or {})})
    scratch.rename(path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        state: dict[str, Any] = json.loads(file.metadata()["state"])
    return tensors, state
