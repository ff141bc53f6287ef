"""How far a bundle's traffic is from what the bundle was validated on.

Figure: population stability index (PSI), the sum over bins of (live - expected) * ln(live / expected). By custom below
0.1 is no drift, above 0.25 a large one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge

from service.metrics.scored import Tally

# Below so many values PSI says more of chance than of drift: among ten bins it is about 10 / values without any.
LEAST = 500
# No share is taken for smaller: one value in a bin that was empty must not make the figure boundless.
_FLOOR = 1e-3


@dataclass(frozen=True)
class Reference:
    """Bins of one quantity, and what is known of the share of the validation split at or below each edge."""

    edges: NDArray[np.float64]
    least: NDArray[np.float64]  # for each edge
    most: NDArray[np.float64]

    @property
    def bin_count(self) -> int:
        """How many bins there are; a value on an edge is in the bin below it."""
        return len(self.edges) + 1

    @classmethod
    def of_deciles(cls, deciles: Sequence[float], *, whole: bool = False) -> "Reference":
        """Make bins of 11 deciles, the least and the largest value among them.

        Of `whole` numbers, many values are equal to a decile, so the share at or below it is only known to a tenth.
        """
        edges, first, copies = np.unique(np.array(deciles[1:-1], np.float64), return_index=True, return_counts=True)
        least = (first + copies) / (len(deciles) - 1)  # by the last of equal deciles
        return cls(edges, least, least + 1 / (len(deciles) - 1) if whole else least)

    @classmethod
    def of_rate(cls, rate: float) -> "Reference":
        """Make two bins, no and yes."""
        below = np.array([1 - rate])
        return cls(np.array([0.5]), below, below)

    def bins(self, values: ArrayLike) -> NDArray[np.intp]:
        """Return the bin of each value."""
        return np.searchsorted(self.edges, np.asarray(values, np.float64), side="left")

    def psi(self, counts: NDArray[np.int64]) -> float:
        """Return the index of live counts, at least one of them above zero.

        Where the reference leaves a choice, the share nearest to the live one is expected: doubt is no drift.
        """
        live = counts / counts.sum()
        below = np.clip(np.cumsum(live)[:-1], self.least, self.most)
        expected = np.maximum(np.diff(below, prepend=0.0, append=1.0), _FLOOR)
        live = np.maximum(live, _FLOOR)
        return float(((live - expected) * np.log(live / expected)).sum())


def references_of(reference: Mapping[str, Any]) -> dict[str, Reference]:
    """Read a manifest's reference distributions; what it lacks is left out."""
    found = {}
    if "score_deciles" in reference:
        found["score"] = Reference.of_deciles(reference["score_deciles"])
    if "history_length_deciles" in reference:
        found["history_length"] = Reference.of_deciles(reference["history_length_deciles"], whole=True)
    for name, key in (("cold_user", "cold_user_rate"), ("cold_item", "cold_item_rate")):
        if key in reference:
            found[name] = Reference.of_rate(reference[key])
    return found


class BinWindow:
    """How many of the last `size` values fell into each bin."""

    def __init__(self, size: int, bins: int) -> None:
        self._ring = np.zeros(size, np.uint8)
        self._seen = 0
        self.counts = np.zeros(bins, np.int64)

    def add(self, bins: NDArray[np.intp]) -> None:
        """Add values, and let as many of the oldest go as are too many."""
        size = len(self._ring)
        newest = bins[-size:]
        places = (self._seen + np.arange(len(newest))) % size
        left = self._ring[places[self._seen + np.arange(len(newest)) >= size]]
        self.counts -= np.bincount(left, minlength=len(self.counts))
        self.counts += np.bincount(newest, minlength=len(self.counts))
        self._ring[places] = newest
        self._seen += len(newest)


class DriftMetrics:
    """Counts each bundle's traffic in the bins of its reference. A bundle without a reference has no such series."""

    def __init__(self, registry: CollectorRegistry, window: int) -> None:
        self._window = window
        self._bins = Counter(
            "sella_reference_bin_total",
            "Values in each bin of the bundle's reference distribution.",
            ["bundle", "of", "bin"],
            registry=registry,
        )
        self._psi = Gauge(
            "sella_drift_psi",
            "Population stability index of the latest values against the bundle's reference.",
            ["bundle", "of"],
            registry=registry,
        )
        self._references: dict[str, dict[str, tuple[Reference, BinWindow]]] = {}

    def begin(self, bundle: str, reference: Mapping[str, Any]) -> None:
        """Compare a bundle's traffic with its reference from now on."""
        if bundle in self._references:
            return
        found = references_of(reference)
        self._references[bundle] = {of: (one, BinWindow(self._window, one.bin_count)) for of, one in found.items()}
        for of, one in found.items():
            for index in range(one.bin_count):
                self._bins.labels(bundle, of, str(index))

    def add(self, bundle: str, tally: Tally) -> None:
        """Add a scored request."""
        pairs = len(tally.scores_N)
        values: dict[str, ArrayLike] = {
            "score": tally.scores_N,
            "history_length": tally.histories_Q,
            "cold_user": np.arange(pairs) < tally.cold_user_pairs,
            "cold_item": np.arange(pairs) < tally.cold_items,
        }
        for of, (reference, window) in self._references.get(bundle, {}).items():
            bins = reference.bins(values[of])
            window.add(bins)
            for index, count in enumerate(np.bincount(bins).tolist()):
                if count:
                    self._bins.labels(bundle, of, str(index)).inc(count)

    def refresh(self) -> None:
        """Compute the indices anew; not before there are enough values."""
        for bundle, references in self._references.items():
            for of, (reference, window) in references.items():
                if window.counts.sum() >= LEAST:
                    self._psi.labels(bundle, of).set(reference.psi(window.counts))

    def retire(self, bundle: str) -> None:
        """Forget a bundle and drop its series."""
        self._references.pop(bundle, None)
        self._bins.remove_by_labels({"bundle": bundle})
        self._psi.remove_by_labels({"bundle": bundle})
