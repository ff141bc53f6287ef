import numpy as np

from models.features import ItemFeatures
from service.features.cache import ABSENT_S, ItemCache
from service.metrics.registry import Metrics


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def item(item_id: str, floats: int = 1000) -> ItemFeatures:
    vector = np.zeros(floats, np.float32)
    return ItemFeatures(item_id, "A title", vector[:1], vector[:1], vector, trained=True)


def cache(max_bytes: int, clock: Clock | None = None) -> tuple[ItemCache, Metrics]:
    metrics = Metrics()
    return ItemCache(max_bytes, metrics.store, clock=clock or Clock()), metrics


def test_the_budget_holds_and_the_least_used_goes_first() -> None:
    items, metrics = cache(12_000)
    items.put("b", {"1": item("1")})
    items.put("b", {"2": item("2")})
    items.find("b", frozenset("1"))
    items.put("b", {"3": item("3")})
    found, missing = items.find("b", frozenset("123"))
    assert found.keys() == {"1", "3"} and missing == ["2"]
    assert 8_000 < (metrics.registry.get_sample_value("sella_item_cache_bytes") or 0) <= 12_000
    assert metrics.registry.get_sample_value("sella_item_cache_hits_total") == 3
    assert metrics.registry.get_sample_value("sella_item_cache_misses_total") == 1


def test_an_item_of_one_bundle_is_not_another_bundles() -> None:
    items, _ = cache(100_000)
    items.put("b", {"1": item("1")})
    assert items.find("c", frozenset("1")) == ({}, ["1"])


def test_absence_is_known_for_some_seconds_only() -> None:
    clock = Clock()
    items, _ = cache(100_000, clock)
    items.put("b", {"1": None})
    assert items.find("b", frozenset("1")) == ({}, [])
    clock.now += ABSENT_S + 0.1
    assert items.find("b", frozenset("1")) == ({}, ["1"])


def test_nothing_is_kept_without_a_budget_and_a_freed_bundle_leaves_nothing() -> None:
    none, _ = cache(0)
    none.put("b", {"1": item("1")})
    assert none.find("b", frozenset("1")) == ({}, ["1"])
    items, metrics = cache(100_000)
    items.put("b", {"1": item("1")})
    items.put("c", {"1": item("1")})
    items.forget("b")
    assert items.find("b", frozenset("1"))[1] == ["1"] and items.find("c", frozenset("1"))[0]
    items.forget("c")
    assert metrics.registry.get_sample_value("sella_item_cache_bytes") == 0
