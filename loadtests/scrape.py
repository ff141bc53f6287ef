"""A service's metrics at one moment, and what was counted between two."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

Key = tuple[str, frozenset[tuple[str, str]]]


@dataclass(frozen=True)
class Histogram:
    """Cumulative counts by upper bound, the last of which is infinite."""

    bounds: tuple[float, ...]
    counts: tuple[float, ...]

    @property
    def count(self) -> int:
        """How many were observed."""
        return int(self.counts[-1]) if self.counts else 0

    def share_within(self, bound: float) -> float | None:
        """Return the share of observations up to one of the bounds; None of none.

        Raises:
            ValueError: it is no bound, so the histogram cannot tell.
        """
        if bound not in self.bounds:
            raise ValueError(f"{bound:g} is none of the histogram's bounds {self.bounds}")
        return self.counts[self.bounds.index(bound)] / self.count if self.count else None

    def quantile_at_most(self, q: float) -> float | None:
        """Return the bound that a quantile does not exceed; None of none."""
        if not self.count:
            return None
        return next(bound for bound, count in zip(self.bounds, self.counts, strict=True) if count >= q * self.count)


@dataclass(frozen=True)
class Scrape:
    """Every sample by name and labels."""

    samples: Mapping[Key, float]

    @classmethod
    def parse(cls, text: str) -> "Scrape":
        """Read Prometheus's text format."""
        families = text_string_to_metric_families(text)
        return cls({(one.name, frozenset(one.labels.items())): one.value for of in families for one in of.samples})

    def value(self, name: str, **labels: str) -> float:
        """Return one sample, 0 if it was never counted."""
        return self.samples.get((name, frozenset(labels.items())), 0.0)

    def has(self, name: str) -> bool:
        """Return whether a metric exists at all."""
        return any(sample.startswith(name) for sample, _ in self.samples)

    def histogram_since(self, earlier: "Scrape", name: str) -> Histogram:
        """Return what a histogram without labels observed between two scrapes."""
        rows = sorted(
            (math.inf if le == "+Inf" else float(le), value - earlier.value(f"{name}_bucket", le=le))
            for (sample, labels), value in self.samples.items()
            if sample == f"{name}_bucket" and (le := dict(labels)["le"])
        )
        return Histogram(tuple(bound for bound, _ in rows), tuple(count for _, count in rows))
