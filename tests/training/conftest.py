"""A micro configuration that trains the whole way in seconds, trained once and shared by the tests that only read."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from models.backbone import Backbone, load_merged
from models.loading import Bundle
from tests.training.micro import MICRO, SIZES, Trained
from training.config import Config
from training.data.dataset import Dataset, load_dataset
from training.data.history import Histories, build_histories
from training.data.synthetic import SyntheticConfig, write_synthetic
from training.evaluate import Scorer
from training.examples import Examples
from training.pipeline import TINY, fit
from training.run import Run, read_tensors
from training.stages.align import Collab, align


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the synthetic data, with its test split."""
    folder = tmp_path_factory.mktemp("micro") / "data"
    write_synthetic(folder, SyntheticConfig(**SIZES))
    return folder


@pytest.fixture(scope="session")
def dataset(data: Path) -> Dataset:
    """Train and valid alone, as a `fit` sees them."""
    whole = load_dataset(data)
    return Dataset(whole.items, {name: whole.splits[name] for name in ("train", "valid")})


@pytest.fixture(scope="session")
def histories(dataset: Dataset) -> Histories:
    return build_histories(dataset)


@pytest.fixture(scope="session")
def new_run() -> Callable[..., Run]:
    """Return a maker of runs: folder, and keys of the micro configuration to replace."""

    def make(folder: Path, **changes: Any) -> Run:
        folder.mkdir(parents=True, exist_ok=True)
        config = Config.changed_by({**MICRO, **changes})
        return Run(folder, config, Accelerator(cpu=True), Console(quiet=True))

    return make


@pytest.fixture(scope="session")
def trained(data: Path, new_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The micro bundle and its run folder; tests only read them."""
    folder = tmp_path_factory.mktemp("trained")
    run = new_run(folder / "bundle.run")
    report = fit(run, load_dataset(data), TINY, folder / "bundle", resume=False)
    return Trained(data, run.folder, folder / "bundle", report, run.config)


@pytest.fixture(scope="session")
def bundle(
    trained: Trained, dataset: Dataset, new_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """The same bundle as of the end of valid: its histories and counts hold no row of test."""
    folder = tmp_path_factory.mktemp("before_test")
    shutil.copytree(trained.folder, folder / "bundle.run")
    (folder / "bundle.run" / "run.json").unlink()
    fit(new_run(folder / "bundle.run"), dataset, TINY, folder / "bundle", resume=True)
    return Bundle.open(folder / "bundle")


@pytest.fixture(scope="session")
def scorer(bundle: Bundle) -> Scorer:
    model, tables = bundle.model(), bundle.tables()
    return Scorer(model, tables, bundle.assembler(model.backbone.encoder, tables))


@pytest.fixture(scope="session")
def merged(trained: Trained) -> Backbone:
    """The adapted language model that stages 2 and 3 hold frozen."""
    return load_merged(trained.folder / "backbone", trained.folder / "adapter", dtype=torch.float32)


@pytest.fixture(scope="session")
def examples(dataset: Dataset, histories: Histories, scorer: Scorer) -> Examples:
    return Examples(dataset, histories, scorer.assembler.template)


@pytest.fixture(scope="session")
def semantic_vectors(trained: Trained) -> torch.Tensor:
    return read_tensors(trained.folder / "distil.safetensors")[0]["semantic"]


@pytest.fixture(scope="session")
def collab(trained: Trained, examples: Examples, semantic_vectors: torch.Tensor, new_run: Callable[..., Run]) -> Collab:
    """What stage 2 of the trained run left."""
    return align(new_run(trained.folder), examples, semantic_vectors)


@pytest.fixture
def copied(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(trained.bundle, tmp_path / "copy"))
