import random

import pytest

from service.access import rates
from service.access.rates import RateLimiter
from tests.service.access.test_key_file import Clock


def test_a_burst_passes_then_the_rate() -> None:
    clock = Clock()
    limiter = RateLimiter(2.0, clock)
    assert [limiter.take("a", 5) for _ in range(11)] == [0] * 10 + [1]
    passed = 0
    for _ in range(1000):
        clock.now += 0.01
        passed += limiter.take("a", 5) == 0
    assert passed == pytest.approx(50, abs=1)
    assert limiter.take("b", 5) == 0  # another client has a bucket of its own


def test_one_who_waits_as_told_passes() -> None:
    clock, chance = Clock(), random.Random(7)
    limiter = RateLimiter(1.0, clock)
    for _ in range(300):
        clock.now += chance.random()
        wait_s = limiter.take("a", 0.3)
        if wait_s:
            clock.now += wait_s
            assert limiter.take("a", 0.3) == 0


def test_memory_is_bounded_and_the_longest_silent_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "MAX_BUCKETS", 3)
    limiter = RateLimiter(1.0, Clock())
    for client in ("a", "b", "c"):
        assert limiter.take(client, 1) == 0
    assert limiter.take("a", 1) > 0
    assert limiter.take("d", 1) == 0
    assert len(limiter) == 3
    assert limiter.take("a", 1) > 0  # still known
    assert limiter.take("b", 1) == 0  # forgotten
