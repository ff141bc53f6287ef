"""Nothing of a deleted user comes back: by a request in flight, or by a server that has not heard of the deletion."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from models.loading import Bundle
from models.scoring_model import ScoringModel
from service.engines.packed import PackedModel
from service.engines.protocol import Outcome, ScoreJob
from tests.redis_server import redis_server
from tests.service.conftest import client_of, collaborators
from tests.service.direct import DirectEngine
from tests.service.published import publish

pytestmark = pytest.mark.anyio

ASKED = {"user_id": "u1", "candidates": ["i1", "i2"]}


class HeldEngine(DirectEngine):
    """Computes with the real model once `gate` is opened; what was sent before a `forget` is computed before it."""

    def __init__(self, model: PackedModel) -> None:
        super().__init__(model)
        self.gate, self.held = asyncio.Event(), 0

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Outcome]:
        self.held += 1
        await self.gate.wait()
        return await super().score(jobs)


@pytest.mark.parametrize("user_id", ["u1", "u2"])
async def test_a_request_in_flight_leaves_nothing_of_a_user_who_is_deleted_meanwhile(
    bundle: Bundle, model: ScoringModel, tmp_path: Path, user_id: str
) -> None:
    engine = HeldEngine(PackedModel(bundle, model, batch_tokens=1024))
    engine.forget()
    service = collaborators(bundle, engine, interactions=tmp_path / "log.sqlite")
    await service.interactions.start()
    async with client_of(service) as client:
        pairs = {"pairs": [{"user_id": one, "item_id": "i1"} for one in ("u1", "u3")]}
        asked = [
            asyncio.create_task(client.post("/rank", json=ASKED)),
            asyncio.create_task(client.post("/score", json=pairs)),
        ]
        while not engine.held:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert (await client.delete(f"/users/{user_id}")).status_code == 200
        engine.gate.set()
        assert [(await one).status_code for one in asked] == [200, 200]
        metrics = (await client.get("/metrics")).text
        if user_id == "u1":
            assert engine.usage().cache_bytes == 0 and "sella_served_scores 1.0" in metrics  # u3's alone
        else:
            assert engine.usage().cache_bytes > 0 and "sella_served_scores 4.0" in metrics
        await client.post("/rank", json=ASKED)  # one that began after the deletion is no other request
        assert engine.usage().cache_bytes > 0
    await service.interactions.close()


async def asks(client: httpx.AsyncClient) -> tuple[int, int, str]:
    ready, ranked = await client.get("/readyz"), await client.post("/rank", json=ASKED)
    return ready.status_code, ranked.status_code, ready.json()["store"]["detail"]


async def test_a_log_begun_while_redis_is_away_scores_nobody_until_the_deletions_are_known(
    bundle: Bundle, model: ScoringModel, tmp_path: Path
) -> None:
    with redis_server() as redis:
        publish(redis, bundle)
        with redis.client() as client_of_redis:
            deleted_at = time.time()
            client_of_redis.hset("sella:live:deleted", "u1", repr(deleted_at))
        settings = {"store": redis.url, "interactions": tmp_path / "log.sqlite", "redis_timeout_ms": 2000}
        redis.kill()
        for expected, known in (((503, 503), False), ((200, 200), True)):
            service = collaborators(bundle, DirectEngine(PackedModel(bundle, model, batch_tokens=1024)), **settings)
            await service.interactions.start()
            async with client_of(service) as client:
                while "because" not in (told := await asks(client))[2]:
                    await asyncio.sleep(0.05)
                assert told[:2] == expected, told
                if not known:
                    assert "who was deleted is not known" in told[2]
                    answer = await client.post("/rank", json=ASKED)
                    assert answer.json()["error"]["code"] == "not_ready" and answer.headers["retry-after"]
                    redis.start()
                    publish(redis, bundle)
                    with redis.client() as client_of_redis:
                        client_of_redis.hset("sella:live:deleted", "u1", repr(deleted_at))
                    while not service.interactions.deletions_known() or (await asks(client))[:2] != (200, 200):
                        await asyncio.sleep(0.05)
                    redis.kill()
                    await asks(client)
                assert (await client.post("/rank", json=ASKED)).json()["cold_user"]  # it was deleted, as the log knows
                assert not (await client.post("/rank", json={**ASKED, "user_id": "u2"})).json()["cold_user"]
            await service.interactions.close()
            await service.bundles.current.store.close()
            await service.stores.close()


async def test_who_accepts_it_scores_by_the_bundle_where_the_deletions_are_not_known(
    bundle: Bundle, model: ScoringModel, tmp_path: Path
) -> None:
    settings = {"store": f"unix://{tmp_path}/none", "interactions": tmp_path / "log.sqlite", "require_deletions": False}
    service = collaborators(bundle, DirectEngine(PackedModel(bundle, model, batch_tokens=1024)), **settings)
    async with client_of(service) as client:
        assert (await asks(client))[:2] == (200, 200)
    await service.bundles.current.store.close()
    await service.stores.close()
