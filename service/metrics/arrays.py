"""A histogram that takes a thousand values at once: prometheus-client's own takes each in a call."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


@dataclass(slots=True)
class _Series:
    counts: NDArray[np.int64]  # one more than there are edges: what is over the last
    total: float = 0.0


class ArrayHistogram(Collector):
    """A histogram with one series for each set of label values that was begun."""

    def __init__(
        self,
        name: str,
        documentation: str,
        label_names: Sequence[str],
        edges: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._label_names = tuple(label_names)
        self._edges = np.array(edges, np.float64)
        self._series: dict[tuple[str, ...], _Series] = {}
        registry.register(self)

    def begin(self, *labels: str) -> None:
        """Let a series exist, at zero."""
        if labels not in self._series:
            self._series[labels] = _Series(np.zeros(len(self._edges) + 1, np.int64))

    def observe(self, values: ArrayLike, *labels: str) -> None:
        """Add values to a series."""
        self.begin(*labels)
        series, found = self._series[labels], np.asarray(values, np.float64)
        bins = np.searchsorted(self._edges, found, side="left")  # `le` is inclusive
        series.counts += np.bincount(bins, minlength=len(series.counts))
        series.total += float(found.sum())

    def remove(self, *labels: str) -> None:
        """Drop a series, if there is one."""
        self._series.pop(labels, None)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Return every series, as a registry asks for them."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._label_names)
        names = [*map(floatToGoString, self._edges), "+Inf"]
        for labels, series in self._series.items():
            buckets = list(zip(names, np.cumsum(series.counts).tolist(), strict=True))
            family.add_metric(labels, buckets, series.total)
        yield family
