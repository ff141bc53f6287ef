from pathlib import Path

import pytest
import torch

from models.assembly import Assembler
from models.features import Tables
from models.loading import Bundle
from models.scoring_model import ScoringModel


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tables(bundle: Bundle) -> Tables:
    return bundle.tables()


@pytest.fixture(scope="session")
def model(bundle: Bundle) -> ScoringModel:
    return bundle.model()


@pytest.fixture(scope="session")
def assembler(bundle: Bundle, tables: Tables) -> Assembler:
    return bundle.assembler(bundle.encoder(), tables)


@pytest.fixture
def copied(bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    import shutil

    return Path(shutil.copytree(bundle.folder, tmp_path / "copy"))
