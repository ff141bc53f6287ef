"""`sella-serve run` with vLLM as a process: the packed engine's answers, and nothing left behind."""

import signal
from collections.abc import Iterator

import httpx
import psutil
import pytest

from models.loading import Bundle
from models.scoring_model import ScoringModel
from service.engines.packed import PackedModel
from service.settings import Settings
from tests.service.conftest import client_of, collaborators
from tests.service.direct import DirectEngine
from tests.service.test_supervised import alive
from tests.serving import Server, wait_for

pytestmark = pytest.mark.anyio

BODIES = [
    {"user_id": "u0", "candidates": ["i1", {"item_id": "new", "title": "Brand new"}, "i39"]},
    {"user_id": "nobody", "history": ["i3", {"item_id": "new", "title": "夜 <User_ID>"}], "candidates": ["i2", "i0"]},
    {"user_id": "u19", "history": [], "candidates": [f"i{row}" for row in range(40)]},
]


@pytest.fixture(scope="module")
def server(bundle: Bundle, settings: Settings) -> Iterator[Server]:
    server = Server(
        bundle.folder,
        PYTHONWARNINGS="default",
        SELLA_ENGINE="vllm",
        SELLA_VLLM_WEIGHTS=str(settings.vllm_weights),
        SELLA_VLLM_KV_GIB="0.25",
        SELLA_VLLM_EAGER="1",
    )
    yield server
    server.clean_up()


async def test_rank_answers_as_the_packed_engine_does(server: Server, bundle: Bundle, model: ScoringModel) -> None:
    with server.client() as client:
        assert client.post("/rank", json=BODIES[0]).status_code == 503
        wait_for(lambda: client.get("/readyz").status_code == 200, 240)
        answers = [client.post("/rank", json=body) for body in BODIES]
    packed = collaborators(bundle, DirectEngine(PackedModel(bundle, model, batch_tokens=600)))
    async with client_of(packed) as direct:
        for body, answer in zip(BODIES, answers, strict=True):
            assert answer.status_code == 200, answer.text
            assert scores(answer) == pytest.approx(scores(await direct.post("/rank", json=body)), abs=1e-5)


def scores(answer: httpx.Response) -> dict[str, float]:
    return {one["item_id"]: one["raw_score"] for one in answer.json()["results"]}


def test_a_killed_server_leaves_no_process(server: Server) -> None:
    started = [process.pid for process in psutil.Process(server.process.pid).children(recursive=True)]
    assert len(started) >= 4  # the resource tracker, the distiller, vLLM's engine core and its worker
    server.end(signal.SIGKILL)
    wait_for(lambda: not any(alive(pid) for pid in started), 30)
