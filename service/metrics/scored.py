"""Scored requests, by the bundle that scored them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Histogram

from models.features import Floats
from service.metrics.arrays import ArrayHistogram

LEGS = ("lookup", "assemble", "queue", "forward", "total")
ROUTES = ("/score", "/rank")

# From a warm GPU's millisecond to the longest deadline that a request may ask for.
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_LENGTHS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_SCORES = tuple(step / 20 for step in range(1, 21))


@dataclass(frozen=True, slots=True)
class Tally:
    """What one scored request adds to the metrics. Shapes: N scored pairs, Q questions (users with a history)."""

    asked: int  # candidates or pairs of the request, skipped ones too
    scores_N: Floats  # calibrated
    cold_users: int  # each once
    cold_user_pairs: int
    cold_items: int
    unknown_items: int
    histories_Q: NDArray[np.int64]  # liked items in all
    history_dropped: int


class ScoredMetrics:
    """What was scored, how long its legs took, and what it looked like. `bundle` is a bundle id's first 12 digits."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, documentation: str) -> Counter:
            return Counter(name, documentation, ["bundle"], registry=registry)

        self._legs = Histogram(
            "sella_leg_seconds",
            "Time of each leg of a scored request.",
            ["leg", "bundle"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._candidates = ArrayHistogram(
            "sella_request_candidates",
            "Candidates or pairs of a scored request.",
            ["route", "bundle"],
            _COUNTS,
            registry,
        )
        self._scores = ArrayHistogram("sella_scores", "Calibrated scores.", ["bundle"], _SCORES, registry)
        self._histories = ArrayHistogram(
            "sella_history_length", "Liked items of a scored user, in all.", ["bundle"], _LENGTHS, registry
        )
        self._cold_users = counter("sella_cold_users_total", "Users scored without training data, once a request.")
        self._cold_items = counter(
            "sella_cold_items_total", "Scored candidates without training data, unknown ones too."
        )
        self._unknown_items = counter("sella_unknown_items_total", "Scored candidates from outside the catalogue.")
        self._history_dropped = counter(
            "sella_history_dropped_total", "Liked items that did not stand in the prompt: too old, or over its budget."
        )
        self._counters = (self._cold_users, self._cold_items, self._unknown_items, self._history_dropped)

    def begin(self, bundle: str) -> None:
        """Let a bundle's series exist, at zero."""
        for leg in LEGS:
            self._legs.labels(leg, bundle)
        for route in ROUTES:
            self._candidates.begin(route, bundle)
        self._scores.begin(bundle)
        self._histories.begin(bundle)
        for counter in self._counters:
            counter.labels(bundle)

    def add(self, bundle: str, route: str, legs: Mapping[str, float], tally: Tally) -> None:
        """Count a scored request; `legs` are seconds."""
        for leg, seconds in legs.items():
            self._legs.labels(leg, bundle).observe(seconds)
        self._candidates.observe([tally.asked], route, bundle)
        self._scores.observe(tally.scores_N, bundle)
        self._histories.observe(tally.histories_Q, bundle)
        self._cold_users.labels(bundle).inc(tally.cold_users)
        self._cold_items.labels(bundle).inc(tally.cold_items)
        self._unknown_items.labels(bundle).inc(tally.unknown_items)
        self._history_dropped.labels(bundle).inc(tally.history_dropped)

    def retire(self, bundle: str) -> None:
        """Drop a bundle's series."""
        self._legs.remove_by_labels({"bundle": bundle})
        for route in ROUTES:
            self._candidates.remove(route, bundle)
        self._scores.remove(bundle)
        self._histories.remove(bundle)
        for counter in self._counters:
            counter.remove_by_labels({"bundle": bundle})
