"""What the commands begin with: data read, a run set up, a bundle opened."""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from transformers.utils import logging as transformers_logging

from models.loading import PRECISIONS, Bundle
from models.memory import keep_freed_memory
from training.config import Config, ConfigError
from training.data.dataset import Dataset, load_dataset
from training.data.split import SplitRule
from training.data.tables import parse_columns
from training.evaluate import Scorer
from training.progress import Lines, Progress, TaskProgress
from training.run import Run

WAIT_FOR_OTHERS = timedelta(days=7)  # torchrun ends all processes when one fails, so none waits for a dead one


def new_run(folder: Path, config: Config) -> Run:
    """Set up this process's part of a run; `torchrun` or `accelerate launch` decide how many there are.

    On a CPU it takes `torchrun --nproc_per_node N`: `accelerate launch --cpu` starts one process, whatever it is asked.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    keep_freed_memory()
    # By default a process gives up on the others after 10 minutes; the main process alone takes longer over some parts.
    patience = InitProcessGroupKwargs(timeout=WAIT_FOR_OTHERS)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    if accelerator.device.type == "cpu":
        # Threads otherwise add up a table's gradients in any order, and no two runs are bit-equal.
        torch.use_deterministic_algorithms(True)
        # By default torch then also fills new tensors with NaN. This costs time, and equal runs do not need it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return Run(folder, config, accelerator, Console() if Console().is_terminal else Console(width=120))


def read_data(
    folder: Path,
    positive_above: float | None,
    split_by: str | None,
    require: Sequence[str] = ("train", "valid"),
    columns: str | None = None,
) -> Dataset:
    """Read a data folder with the options of the command line; say what was dropped of it and what looks wrong."""
    if positive_above is not None and not math.isfinite(positive_above):
        raise ConfigError(f"--positive-above {positive_above}: give a number")
    split = None if split_by is None else SplitRule.parse(split_by)
    named = parse_columns(columns)
    dataset = load_dataset(folder, positive_above=positive_above, split=split, columns=named, require=require)
    said = [f"warning: {one}" for one in dataset.warnings]
    if dataset.deletions is not None:
        said.append(
            f"{dataset.deletions.height:,} deleted users: {dataset.rows_forgotten:,} rows of theirs are left out"
        )
    if os.environ.get("RANK", "0") == "0":  # of several processes one says it
        print("".join(f"{line}\n" for line in said), end="", file=sys.stderr)
    return dataset


def chosen_device(name: str) -> str:
    """Return the device of `--device`, or by default the GPU where there is one.

    Raises:
        ConfigError: torch does not know it, or this machine does not have it.
    """
    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}; give for example cpu or cuda") from error
    return name


def open_scorer(folder: Path, device: str, dtype: str | None) -> tuple[Bundle, Scorer]:
    """Open a bundle and load its parts; on the GPU where there is one.

    Raises:
        BundleError, BackboneError: it cannot be used.
        ConfigError: there is no such device or number type.
    """
    if dtype is not None and dtype not in PRECISIONS:
        raise ConfigError(f"--dtype {dtype}: give one of {', '.join(PRECISIONS)}")
    device = chosen_device(device)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    bundle = Bundle.open(folder)
    tables = bundle.tables()
    model = bundle.model(device=device, dtype=dtype)
    return bundle, Scorer(model, tables, bundle.assembler(model.backbone.encoder, tables))


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Show a bar on stderr, so that stdout has only the result; if stderr is no terminal, a line every 30 s."""
    console = Console(stderr=True)
    if not console.is_terminal:
        lines = Lines(lambda line: print(line, file=sys.stderr, flush=True))
        yield TaskProgress(lines, title, 0, unit="row").count
        return
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
