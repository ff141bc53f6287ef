"""The bulk histogram against prometheus-client's own."""

import numpy as np
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from service.metrics.arrays import ArrayHistogram

EDGES = (0.1, 0.25, 0.5, 1.0)


def test_it_exposes_what_prometheus_own_histogram_does() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    bulk = ArrayHistogram("sella_x", "X.", ["of"], EDGES, ours)
    single = Histogram("sella_x", "X.", ["of"], buckets=EDGES, registry=theirs)
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        values = np.concatenate([rng.uniform(0, 1.2, 500), EDGES, [0.0]])
        bulk.observe(values[:100], label)
        bulk.observe(values[100:], label)
        for value in values:
            single.labels(label).observe(value)
    for name in ("bucket", "count"):
        for label in ("a", "b"):
            for edge in [*map(str, EDGES), "+Inf"] if name == "bucket" else [None]:
                labels = {"of": label} | ({"le": edge} if edge else {})
                assert ours.get_sample_value(f"sella_x_{name}", labels) == theirs.get_sample_value(
                    f"sella_x_{name}", labels
                )
    kept = [line for line in generate_latest(theirs).decode().splitlines() if "_created" not in line]
    assert [line.split()[:1] for line in generate_latest(ours).decode().splitlines()] == [
        line.split()[:1] for line in kept
    ]


def test_a_series_begins_at_zero_and_can_be_removed() -> None:
    registry = CollectorRegistry()
    bulk = ArrayHistogram("sella_x", "X.", ["of"], EDGES, registry)
    bulk.begin("a")
    assert registry.get_sample_value("sella_x_count", {"of": "a"}) == 0
    bulk.observe([], "a")
    bulk.remove("a")
    assert registry.get_sample_value("sella_x_count", {"of": "a"}) is None
