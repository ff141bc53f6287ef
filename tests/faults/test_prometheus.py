"""A real Prometheus beside the real service: every query of every panel and rule finds data."""

import math
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from tests.redis_server import redis_server
from tests.service.published import publish
from tests.service.test_dashboards import PROMETHEUS, expressions, rules
from tests.serving import Server, wait_for
from tests.tiny import TinySize, tiny_bundle

pytestmark = pytest.mark.timeout(300)

REFERENCE = {
    "score_deciles": np.linspace(0, 1, 11).tolist(),
    "history_length_deciles": [0, 1, 3, 4, 5, 7, 8, 10, 11, 13, 23],
    "cold_user_rate": 0.15,
    "cold_item_rate": 0.12,
}
CANDIDATES = [f"i{item}" for item in range(40)]
# A queue as short as this refuses whatever comes while something waits.
ENVIRONMENT = {"SELLA_QUEUE_TOKENS": "64", "SELLA_BATCHES_IN_FLIGHT": "1", "SELLA_ATTRIBUTION_S": "1"}
ROUNDS = 12


class Prometheus:
    """A started Prometheus with the rules that are deployed, scraping one service every second."""

    def __init__(self, folder: Path, target: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        shutil.copytree(PROMETHEUS / "rules", folder / "rules")
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        for job, at in zip(config["scrape_configs"], (target, address), strict=True):
            job["static_configs"] = [{"targets": [at]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
                "--log.level=warn",
            ],
            stdout=self._log,
            stderr=self._log,
        )
        self._client = httpx.Client(base_url=f"http://{address}", timeout=30)

    def ready(self) -> bool:
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, expression: str) -> list[float]:
        """Return a query's values, those that are numbers."""
        answer = self._client.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", (expression, answer)
        values = [float(one["value"][1]) for one in answer["data"]["result"]]
        return [value for value in values if not math.isnan(value)]

    def rules(self) -> list[dict[str, Any]]:
        groups = self._client.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def clean_up(self) -> None:
        self._client.close()
        self._process.kill()
        self._process.wait()
        self._log.close()


@pytest.fixture(scope="module")
def servers() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory, servers: ExitStack) -> Iterator[Prometheus]:
    """A Prometheus that has watched a service under every kind of request."""
    folder = tmp_path_factory.mktemp("watched")
    bundle = tiny_bundle(folder / "bundle", size=TinySize(users=40), reference=REFERENCE)
    other = tiny_bundle(folder / "other", size=TinySize(users=40), seed=1)
    redis = servers.enter_context(redis_server())
    publish(redis, bundle)
    server = Server(bundle.folder, SELLA_STORE=redis.url, **ENVIRONMENT)
    try:
        prometheus = Prometheus(folder, server.url.removeprefix("http://"))
        try:
            server.wait_until_loaded()
            wait_for(prometheus.ready)
            with server.client() as client:
                wait_for(lambda: bool(prometheus.ask("sella_ready == 1")))
                shadow = {"bundle": other.folder.name, "role": "shadow", "share": 1.0}
                changed = client.post("/admin/bundle", json=shadow)
                assert changed.status_code == 200, changed.text
                refused = client.post("/admin/bundle", json={"bundle": "nothing", "role": "current"})
                assert refused.status_code == 422, refused.text
                for number in range(ROUNDS):
                    drive(client, number)
                    time.sleep(1)
            time.sleep(3)  # a scrape, and the rules evaluated after it
            yield prometheus
        finally:
            prometheus.clean_up()
    finally:
        server.clean_up()


def drive(client: httpx.Client, number: int) -> None:
    """Send one round: ranks, scores, a new title, refusals, a deadline, outcomes, a deletion."""
    new = {"item_id": "new", "title": f"A new title {number}"}
    ranked = client.post("/rank", json={"user_id": f"u{number}", "candidates": [*CANDIDATES, new]}).json()
    shown = [(ranked["user_id"], one["item_id"], one["rank"]) for one in ranked["results"]]
    pairs = [{"user_id": f"u{user}", "item_id": CANDIDATES[(user + number) % 40]} for user in range(40)]
    scored = client.post("/score", json={"pairs": pairs})
    assert scored.status_code == 200, scored.text
    events = [
        {
            "event_id": f"{number}-{rank}",
            "user_id": user_id,
            "item_id": item_id,
            "request_id": ranked["request_id"],
            "position": rank,
            "timestamp": time.time(),
            "label": None if rank % 5 == 0 else rank % 3 == 0,  # a fifth is never heard of again
        }
        for user_id, item_id, rank in shown
    ]
    for _ in range(2):  # the second time as duplicates
        assert client.post("/interactions", json={"interactions": events}).status_code == 200
    assert client.post("/rank", json={"user_id": f"u{number}", "candidates": ["i1"]}).status_code == 200
    assert client.delete(f"/users/u{number}").status_code == 200
    assert client.post("/rank", json={"user_id": "u1", "candidates": []}).status_code == 422
    late = client.post("/rank", json={"user_id": "u1", "candidates": CANDIDATES}, headers={"x-request-timeout-ms": "1"})
    assert late.status_code in (429, 504)
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(
            lambda _: client.post("/rank", json={"user_id": "u2", "candidates": CANDIDATES}).status_code, range(16)
        )
        assert set(answers) <= {200, 429}


def metrics_of(expression: str) -> set[str]:
    return set(re.findall(r"(?<![\w:])((?:sella|process)_\w+)", re.sub(r'"[^"]*"', "", expression)))


@pytest.mark.parametrize("expression", expressions())
def test_every_query_of_every_panel_finds_data(driven: Prometheus, expression: str) -> None:
    assert driven.ask(expression), expression


def test_every_recording_rule_records_and_no_rule_fails(driven: Prometheus) -> None:
    for rule in driven.rules():
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), rule
    for rule in rules("record"):
        assert driven.ask(rule["record"]), rule["record"]


def test_every_metric_that_an_alert_asks_for_exists(driven: Prometheus) -> None:
    for rule in rules("alert"):
        for name in metrics_of(rule["expr"]):
            assert driven.ask(name), (rule["alert"], name)


def test_what_prometheus_says_agrees_with_what_was_sent(driven: Prometheus) -> None:
    assert driven.ask('sella_requests_total{route="/score", outcome="ok"}') == [ROUNDS]
    assert driven.ask('sella_requests_total{route="/interactions", outcome="ok"}') == [2 * ROUNDS]
    assert driven.ask("sella_users_deleted_total") == [ROUNDS]
    assert driven.ask('sella_interactions_total{outcome="duplicate"}') == [41 * ROUNDS]
    [ok] = driven.ask('sella_requests_total{route="/rank", outcome="ok"}')
    [refused] = driven.ask('sella_requests_total{route="/rank", outcome="refused"}')
    [late] = driven.ask('sella_requests_total{route="/rank", outcome="expired"}') or [0.0]
    assert ok + refused + late == ROUNDS * (1 + 1 + 1 + 16)
    assert driven.ask("sum(sella_refusals_total)") == [refused + late]
    assert driven.ask('sella_bundle_changes_total{outcome="switched"}') == [1]
    assert driven.ask('sella_bundle_changes_total{outcome="refused"}') == [1]
    assert driven.ask("sum(sella_shadow_scored_total) + sum(sella_shadow_dropped_total)") == [ok + ROUNDS]
    [tokens] = driven.ask("sella_tokens_total")
    assert tokens > 0
