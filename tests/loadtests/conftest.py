from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtests.server import Server, serve
from models.loading import Bundle
from tests.tiny import tiny_bundle


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def server(bundle: Bundle) -> Iterator[Server]:
    """One real service for all of these tests: starting it takes longer than they do."""
    with serve(bundle.folder, settings={"SELLA_ENGINE_THREADS": "1"}) as server:
        yield server


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parents[2]
