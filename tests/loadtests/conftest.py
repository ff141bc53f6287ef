from collections.abc import Iterator

import pytest

from loadtests.server import Server, serve
from models.loading import Bundle


@pytest.fixture(scope="session")
def server(bundle: Bundle) -> Iterator[Server]:
    """One real service for all of these tests: starting it takes longer than they do."""
    with serve(bundle.folder, settings={"SELLA_ENGINE_THREADS": "1"}) as server:
        yield server
