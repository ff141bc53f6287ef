"""Overload's figures from known records, samples and histograms."""

import math
import os
import time

import pytest

from loadtests.memory import MIB, MemorySamples, slope_mib_a_minute, watched_memory
from loadtests.overload import figures
from loadtests.records import Answer, Record
from loadtests.scrape import Histogram

REFUSALS = Histogram((0.001, 0.05, 0.1, math.inf), (60, 98, 99, 100))
MEMORY = MemorySamples([0.0, 60.0], [100 * MIB, 110 * MIB], [500 * MIB, 490 * MIB])


def records(good: int, late: int, refused: int) -> list[Record]:
    scored = [Record(1, 1, 1.2, Answer(200))] * good + [Record(1, 1, 1.7, Answer(200))] * late
    return scored + [Record(1, 1.001, 1.004, Answer(429))] * refused


def test_figures_of_a_run() -> None:
    seen = figures(records(190, 10, 400), 10, 0.5, 20, REFUSALS, MEMORY, queue_tokens_after=0)
    assert seen.goodput_of_capacity == pytest.approx(0.95)  # late answers are no goodput
    assert seen.summary.offered_rate == 60
    assert seen.refusals == 100
    assert seen.refusals_within_50_ms == pytest.approx(0.98)
    assert seen.refusal_p99_at_most_ms == pytest.approx(100)
    assert seen.refusal_client_p99_ms == pytest.approx(4)
    assert (seen.server_mib, seen.worker_mib) == ((100, 110), (500, 490))
    assert {row["figure"]: row["value"] for row in seen.rows()}["goodput of capacity"] == "95.0%"


def test_a_run_without_refusals_has_no_figures_of_them() -> None:
    seen = figures(records(10, 0, 0), 10, 0.5, 1, Histogram((0.05, math.inf), (0, 0)), MEMORY, 0)
    assert (seen.refusals, seen.refusals_within_50_ms, seen.refusal_p99_at_most_ms) == (0, None, None)
    assert seen.refusal_client_p99_ms is None


def test_a_p99_beyond_the_last_bound_is_not_a_number() -> None:
    slow = Histogram((0.05, math.inf), (1, 100))
    assert figures(records(1, 0, 99), 10, 0.5, 1, slow, MEMORY, 0).refusal_p99_at_most_ms is None


def test_the_slope_is_of_the_second_half() -> None:
    seconds = [float(second) for second in range(100)]
    warming = [100 * MIB + second * 5 * MIB for second in range(50)]
    leaking = [400 * MIB + second * MIB // 10 for second in range(50)]
    assert slope_mib_a_minute(seconds, warming + leaking) == pytest.approx(6, rel=0.01)
    assert slope_mib_a_minute(seconds, warming + [400 * MIB] * 50) == pytest.approx(0, abs=0.01)
    assert slope_mib_a_minute(seconds[:50], leaking) is None  # too short to tell
    assert slope_mib_a_minute([], []) is None


def test_memory_is_sampled_while_the_block_runs() -> None:
    with watched_memory(os.getpid(), every_s=0.01) as samples:
        while len(samples.worker) < 3:
            time.sleep(0.01)
    assert min(samples.server) > MIB
    assert samples.seconds == sorted(samples.seconds)
    assert len(samples.seconds) == len(samples.server) == len(samples.worker)
