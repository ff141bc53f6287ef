"""The vLLM tier: its own environment (`make test-vllm`), one engine for all tests, fp32, not compiled."""

from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import structlog
import torch

from models.assembly import Assembler
from models.features import Tables
from models.loading import Bundle
from models.scoring_model import ScoringModel
from service.engines.choice import open_engine
from service.engines.vllm import VllmEngine
from service.settings import Settings
from tests.tiny import tiny_bundle

collect_ignore_glob = [] if find_spec("vllm") else ["*"]

torch.set_num_threads(1)

# vLLM and what it imports warn a lot; the core tests hold our own code to none.
LOUD = pytest.mark.filterwarnings("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(LOUD)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    # vLLM's attention on a CPU takes heads of 32 and more.
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", d_model=128)


@pytest.fixture(scope="session")
def tables(bundle: Bundle) -> Tables:
    return bundle.tables()


@pytest.fixture(scope="session")
def assembler(bundle: Bundle, tables: Tables) -> Assembler:
    return bundle.assembler(bundle.encoder(), tables)


@pytest.fixture(scope="session")
def model(bundle: Bundle) -> ScoringModel:
    return bundle.model()


@pytest.fixture(scope="session")
def settings(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(
        bundle=bundle.folder,
        engine="vllm",
        engine_threads=1,
        vllm_weights=tmp_path_factory.mktemp("merged"),
        vllm_kv_gib=0.25,
        vllm_eager=True,
        forward_limit_s=10,
        load_limit_s=240,
    )


@pytest.fixture(scope="session")
async def engine(settings: Settings, bundle: Bundle, assembler: Assembler) -> AsyncIterator[VllmEngine]:
    engine = open_engine(settings, bundle, assembler, structlog.get_logger(), lambda: None)
    assert isinstance(engine, VllmEngine)
    await engine.start()
    await engine.ready()
    yield engine
    await engine.close()
