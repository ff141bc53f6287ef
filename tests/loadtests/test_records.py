"""Figures from known records."""

import pytest

from loadtests.records import NO_ANSWER, Answer, Record, quantile_ms, summarize


def record(latency_s: float, status: int = 200, late_s: float = 0.0) -> Record:
    return Record(1.0, 1.0 + late_s, 1.0 + latency_s, Answer(status))


def test_a_summary_counts_each_request_once() -> None:
    records = [*[record(0.1)] * 90, *[record(0.4)] * 5, record(0.6), record(0.01, 429), record(0.01, 503)]
    records += [record(0.5, 504, late_s=0.02), record(9, NO_ANSWER)]
    summary = summarize(records, seconds=10, limit_s=0.5)
    assert (summary.requests, summary.offered_rate, summary.goodput) == (100, 10, 9.5)
    assert summary.in_time == 0.95
    assert summary.refused == {"429": 1, "503": 1, "504": 1}
    assert summary.failed == 1
    assert (summary.p50_ms, summary.p99_ms) == (pytest.approx(100), pytest.approx(600))
    assert not summary.holds


@pytest.mark.parametrize(("slow", "holds"), [(1, True), (2, False)])
def test_a_refused_request_counts_as_slower_than_the_limit(slow: int, holds: bool) -> None:
    records = [record(0.1)] * (100 - slow) + [record(0.001, 429)] * slow
    assert summarize(records, 10, 0.5).holds is holds


def test_a_quantile_is_one_of_the_values() -> None:
    assert quantile_ms([0.1, 0.2, 0.3, 0.4], 0.5) == pytest.approx(200)
    assert quantile_ms([], 0.5) is None


def test_nothing_sent_holds_nothing() -> None:
    assert not summarize([], 1, 0.5).holds
