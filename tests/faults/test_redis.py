"""Redis killed, paused, slow or restarted empty under load: answers go on, none is wrong, no interaction is lost."""

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import pytest
from redis.asyncio import Redis

from models.fusion import Counts
from models.loading import Bundle
from service.interactions.redis import RedisInteractions
from tests.faults.load import Ask, Load, asks_of, load_on
from tests.faults.slow_wire import SlowWire
from tests.redis_server import RedisServer, redis_server
from tests.service.published import publish
from tests.serving import Server, wait_for
from tests.tiny import tiny_bundle

USERS = ("u0", "u1", "u18", "nobody")
ITEMS = ("i1", "i2", "i3", "i39")
FAULT_S = 4.0


@dataclass
class Deployment:
    """A service with its Redis, and what it said before anything went wrong."""

    server: Server
    redis: RedisServer
    wire: SlowWire
    bundle: Bundle
    asks: list[Ask]
    start: Callable[[int], Server]  # on a port
    told: int = 0  # interactions of the user "writer", each an impression, every second one liked

    def detail(self) -> str:
        readiness = httpx.get(f"{self.server.url}/readyz")
        assert readiness.status_code == 200, readiness.text  # ready, whatever Redis does
        return str(readiness.json()["store"]["detail"])

    def tell(self, count: int, *, retry: bool = False) -> None:
        """Report interactions one by one; each is acknowledged, if need be only after it was sent again."""
        for number in range(self.told, self.told + count):
            event = {"event_id": f"e{number}", "user_id": "writer", "item_id": "i7", "label": number % 2}
            body = {"interactions": [{**event, "timestamp": 1_700_000_001 + number}]}
            while True:
                try:
                    answer = httpx.post(f"{self.server.url}/interactions", json=body, timeout=10)
                    assert answer.status_code == 200, answer.text
                    break
                except (httpx.HTTPError, AssertionError):
                    if not retry:
                        raise
                    time.sleep(0.1)
            assert retry or answer.json()["accepted"] == 1, answer.text
        self.told += count

    def counted(self) -> Counts | None:
        """What Redis has of them."""

        async def ask() -> Counts | None:
            async with Redis.from_url(self.redis.url, protocol=2) as client:
                counted = await RedisInteractions(client, 86_400).counts(self.bundle.id, ["writer"], [])
                return counted.users.get("writer")

        return asyncio.run(ask())

    def all_counted(self) -> bool:
        return self.counted() == Counts(self.told, self.told // 2)


@pytest.fixture(scope="module")
def deployment(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    log = tmp_path_factory.mktemp("log") / "interactions.sqlite"
    with redis_server() as redis:
        publish(redis, bundle)
        wire = SlowWire(redis.socket)
        servers = []

        def start(port: int = 0) -> Server:
            settings = {"SELLA_STORE": wire.url, "SELLA_INTERACTIONS": str(log), "SELLA_ITEM_CACHE_MB": "0"}
            server = Server(bundle.folder, port=port, SELLA_POINTER_S="0.5", **settings)
            servers.append(server)
            wait_for(lambda: httpx.get(f"{server.url}/readyz").status_code == 200)
            return server

        try:
            server = start()
            yield Deployment(server, redis, wire, bundle, asks_of(server.url, USERS, ITEMS), start)
        finally:
            for server in servers:
                server.clean_up()
            wire.close()


@contextmanager
def healthy_again(deployment: Deployment) -> Iterator[None]:
    """Check that Redis answers before the block, and does so again by itself after it."""
    wait_for(lambda: deployment.detail().startswith("redis:"))
    yield
    wait_for(lambda: deployment.detail().startswith("redis:"))
    wait_for(deployment.all_counted)
    time.sleep(2)  # what was sent twice would be counted twice by now
    assert deployment.all_counted()


def assert_good(load: Load) -> None:
    """No wrong score, and of all requests at least 99 % within their deadline."""
    assert len(load.seen) > 20
    assert not load.wrong
    assert load.share_good >= 0.99, load.statuses()


def killed(deployment: Deployment) -> Callable[[], None]:
    deployment.redis.kill()

    def mend() -> None:
        deployment.redis.start()
        publish(deployment.redis, deployment.bundle)

    return mend


def paused(deployment: Deployment) -> Callable[[], None]:
    pause = deployment.redis.paused()
    pause.__enter__()
    return lambda: pause.__exit__(None, None, None)


def slow(deployment: Deployment) -> Callable[[], None]:
    deployment.wire.delay_s = 0.5

    def mend() -> None:
        deployment.wire.delay_s = 0.0

    return mend


def emptied(deployment: Deployment) -> Callable[[], None]:
    deployment.redis.restart_empty()
    return lambda: publish(deployment.redis, deployment.bundle) and None


@pytest.mark.parametrize("fault", [killed, paused, slow, emptied])
def test_answers_go_on_and_interactions_arrive(
    deployment: Deployment, fault: Callable[[Deployment], Callable[[], None]]
) -> None:
    with healthy_again(deployment), load_on(deployment.server.url, deployment.asks) as load:
        deployment.tell(10)
        mend = fault(deployment)
        try:
            began = time.monotonic()
            wait_for(lambda: deployment.detail().startswith("embedded tables"), 20)
            deployment.tell(10)
            time.sleep(max(0.0, FAULT_S - (time.monotonic() - began)))
        finally:
            mend()
        deployment.tell(10)
        time.sleep(1)
    assert_good(load)


def test_a_redis_that_holds_another_bundle_is_not_believed(deployment: Deployment) -> None:
    with healthy_again(deployment), load_on(deployment.server.url, deployment.asks) as load:
        client = deployment.redis.client()
        with client:
            meta = f"sella:{deployment.bundle.id[:16]}:meta"
            kept = client.hget(meta, "bundle_id")
            assert kept is not None
            client.hset(meta, "bundle_id", "0" * 64)
            wait_for(lambda: deployment.detail().startswith("embedded tables"), 20)
            deployment.tell(10)  # interactions are of no bundle: Redis has them at once
            time.sleep(FAULT_S)
            client.hset(meta, "bundle_id", kept)
    assert_good(load)


def test_a_service_killed_between_log_and_redis_loses_and_doubles_nothing(deployment: Deployment) -> None:
    """What was not acknowledged is sent again, as a client would; Redis is away when the service dies."""
    with healthy_again(deployment), deployment.redis.paused(), ThreadPoolExecutor(1) as pool:
        sent = pool.submit(deployment.tell, 500, retry=True)
        time.sleep(1)
        address = httpx.URL(deployment.server.url)
        deployment.server.end(signal.SIGKILL)
        time.sleep(0.5)
        deployment.server.clean_up()
        deployment.server = deployment.start(address.port)
        sent.result(120)
    assert deployment.all_counted()


def test_a_bundle_that_is_published_is_followed_under_load(deployment: Deployment) -> None:
    """The last test: afterwards another bundle is served."""
    other = tiny_bundle(deployment.bundle.folder.with_name("other"), seed=5)
    url, [ask, *_] = deployment.server.url, deployment.asks
    with load_on(url, deployment.asks) as load:
        publish(deployment.redis, other)
        wait_for(lambda: httpx.post(f"{url}/rank", json=ask.body, timeout=30).json().get("bundle_id") == other.id)
        time.sleep(1)
        assert deployment.detail().startswith("redis:")
    assert set(load.statuses()) == {200}
    assert load.wrong  # the other bundle's scores are others
