"""A service that is started for a measurement, its metrics, and where load may go."""

import math
import os
import sys
from pathlib import Path

import httpx
import pytest
import typer

from loadtests.engine import EngineAlone
from loadtests.options import deadline_of, parse_cores
from loadtests.overhead import candidates_a_second, overhead
from loadtests.overload import REFUSAL_SECONDS, REFUSED_WITHIN_S
from loadtests.records import Answer, Record
from loadtests.scrape import Histogram, Scrape
from loadtests.sender import Sender
from loadtests.server import Server, ServerError, pinned, require_loopback, serve
from loadtests.workload import Catalogue, Mix, Workload
from models.fusion import probabilities
from models.loading import Bundle
from service.metrics.registry import Metrics


async def scored(server: Server, asks: Workload) -> list[Answer]:
    async with Sender(server.url) as send:
        return [await send(asks.ask(number)) for number in range(3)]


@pytest.mark.anyio
async def test_its_metrics_count_what_was_sent_and_its_queue_is_empty_after_it(server: Server, bundle: Bundle) -> None:
    before = server.scrape()
    answers = await scored(server, Workload(Catalogue.read(bundle.folder), Mix(rank_share=1)))
    after = server.scrape()
    ok = {"route": "/rank", "outcome": "ok"}
    assert after.value("sella_requests_total", **ok) - before.value("sella_requests_total", **ok) == 3
    assert {answer.status for answer in answers} == {200}
    assert all(0 < answer.timings["forward"] <= answer.timings["total"] for answer in answers)
    assert server.settle() == 0


def test_a_service_that_does_not_start_says_why(tmp_path: Path) -> None:
    broken = (sys.executable, "-c", "import sys; sys.exit('sella-serve: manifest.json: missing')")
    with pytest.raises(ServerError, match=r"^sella-serve: manifest\.json: missing$"), serve(tmp_path, program=broken):
        pass


def test_the_engine_alone_scores_what_the_service_scores(server: Server, bundle: Bundle) -> None:
    ask = Workload(Catalogue.read(bundle.folder), Mix(unknown_share=0)).ranking(3, 12)
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/rank", content=ask.body, headers=headers, timeout=60).json()
    engine = EngineAlone(bundle.folder)
    [logits] = engine.score([engine.group(ask)], max_tokens=2048)
    assert sorted(probabilities(logits).tolist(), reverse=True) == pytest.approx(
        sorted((one["raw_score"] for one in answer["results"]), reverse=True), abs=1e-5
    )


def test_a_histogram_between_two_scrapes() -> None:
    metrics = Metrics()
    metrics.refusal_took(0.3)
    before = Scrape.parse(metrics.text().decode())
    for seconds in (0.0001, 0.03, 0.03, 0.07):
        metrics.refusal_took(seconds)
    seen = Scrape.parse(metrics.text().decode()).histogram_since(before, REFUSAL_SECONDS)
    assert seen.count == 4
    assert seen.share_within(REFUSED_WITHIN_S) == 0.75  # the limit is one of the service's own bounds
    assert seen.quantile_at_most(0.5) == 0.05
    assert seen.quantile_at_most(1) == 0.1
    with pytest.raises(ValueError, match="none of the histogram's bounds"):
        seen.share_within(0.04)
    assert Histogram((0.05, math.inf), (0, 0)).share_within(0.05) is None


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin")
def test_pinning_ends_with_its_block() -> None:
    before = os.sched_getaffinity(0)
    with pinned([min(before)]):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ServerError, match="this process may use"), pinned([4095]):
        pass
    assert os.sched_getaffinity(0) == before


def test_lists_of_cores() -> None:
    assert parse_cores("0-2,5") == (0, 1, 2, 5)
    assert parse_cores("") == ()
    with pytest.raises(typer.BadParameter, match="no list of cores"):
        parse_cores("a-b")


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://[::1]:1", "http://localhost"])
def test_loopback_is_allowed(url: str) -> None:
    assert require_loopback(url) == url


@pytest.mark.parametrize("url", ["http://10.0.0.1", "https://example.org", "http://127.0.0.1.example.org", "", "x"])
def test_load_goes_nowhere_else(url: str) -> None:
    with pytest.raises(ServerError, match="this machine alone"):
        require_loopback(url)


def test_the_deadline_leaves_the_answer_time_to_come_back() -> None:
    assert deadline_of(None, 500) == 450
    assert deadline_of(700, 500) == 700


def test_overhead_is_what_is_left_of_each_request() -> None:
    def single(client: float, total: float, forward: float) -> Record:
        return Record(0, 0, client, Answer(200, {"total": total, "forward": forward}))

    singles = [single(0.020, 0.018, 0.015), single(0.030, 0.027, 0.024), single(0.5, 0.4, 0.3)]
    seen = overhead(singles, [0.012, 0.021, 0.250])
    assert seen.service_ms == pytest.approx(3)
    assert seen.http_ms == pytest.approx(3)
    assert seen.around_ms == pytest.approx(6)
    assert seen.everything_ms == pytest.approx(9)  # 8, 9 and 250


def test_throughput_is_counted_while_every_caller_is_busy() -> None:
    # One caller: an answer each second, the last request sent at 4 s and answered slowly, after everybody else left.
    records = [Record(start, start, start + 1, Answer(200), 10) for start in range(4)]
    records.append(Record(4, 4, 9, Answer(200), 10))
    assert candidates_a_second(records) == 10
    with pytest.raises(ServerError, match="too few"):
        candidates_a_second(records[-1:])
    with pytest.raises(ServerError, match="1 of 6 requests were not scored; the first has 503"):
        candidates_a_second([*records, Record(0, 0, 1, Answer(503))])
