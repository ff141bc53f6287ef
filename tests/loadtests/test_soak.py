"""The soak's verdict from known records and samples."""

import json

import pytest

from loadtests.memory import MIB, MemorySamples
from loadtests.records import Answer, Record, summarize
from loadtests.soak import Soak, figures, reports_of
from loadtests.workload import Catalogue

CATALOGUE = Catalogue(("u1", "u2"), ("i1", "i2"), ("One", "Two"))


def samples(mib_a_minute: float) -> MemorySamples:
    seconds = [float(second) for second in range(120)]
    growing = [round((500 + mib_a_minute * second / 60) * MIB) for second in range(120)]
    return MemorySamples(seconds, [300 * MIB] * 120, growing)


def soak(status: int = 200, reported: int = 200, mib_a_minute: float = 0.0, queue_tokens: float = 0.0) -> Soak:
    records = [Record(1, 1, 1.1, Answer(200))] * 99 + [Record(1, 1, 1.1, Answer(status))]
    reports = [Record(1, 1, 1.1, Answer(200)), Record(1, 1, 1.1, Answer(reported))]
    return figures(10, summarize(records, 10, 0.5), reports, 7, samples(mib_a_minute), queue_tokens)


def test_a_steady_run_passes() -> None:
    seen = soak()
    assert seen.passes
    assert (seen.interactions, seen.interactions_failed) == (7, 0)
    assert seen.worker_slope_mib_a_minute == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(
    "fault", [{"status": 500}, {"status": 0}, {"reported": 503}, {"mib_a_minute": 3.0}, {"queue_tokens": 5.0}]
)
def test_an_error_a_leak_or_a_queue_that_stays_does_not(fault: dict[str, float]) -> None:
    assert not soak(**fault).passes  # type: ignore[arg-type]


def test_a_refusal_is_no_error() -> None:
    assert soak(status=429).passes


def test_interactions_are_batches_of_known_users_and_items_each_event_once() -> None:
    reports = reports_of(CATALOGUE, 50, 4.0, seed=3)
    events = [one for ask in reports for one in json.loads(ask.body)["interactions"]]
    assert len({one["event_id"] for one in events}) == len(events) == sum(ask.candidates for ask in reports)
    assert 150 < len(events) < 250
    assert {one["user_id"] for one in events} == {"u1", "u2"}
    assert {one["label"] for one in events} == {True, False, None}
