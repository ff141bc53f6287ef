"""Metrics of bundles: who serves, changes, and how a shadow differs."""

from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

OUTCOMES = ("switched", "refused")
# From an interactive switch of projections to a large model's load.
_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_DIFFERENCES = (1e-6, 1e-5, 1e-4, 1e-3, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class BundleMetrics:
    """Each event counted once, by one of these methods."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._info = Gauge(
            "sella_bundle_info",
            "1 for each bundle that is loaded and its role.",
            ["bundle_id", "merged_id", "role"],
            registry=registry,
        )
        self._changes = Counter(
            "sella_bundle_changes_total", "Changes of bundles asked for, by outcome.", ["outcome"], registry=registry
        )
        self._seconds = Histogram(
            "sella_bundle_change_seconds",
            "From a change's beginning to the switch, loading included.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._fallbacks = Counter(
            "sella_canary_fallbacks_total",
            "Requests of the canary's users answered by the current bundle, its engine not being ready.",
            registry=registry,
        )
        self._difference = Histogram(
            "sella_shadow_difference",
            "Absolute difference of a candidate's score between the shadow and the bundle that answered.",
            ["bundle"],
            buckets=_DIFFERENCES,
            registry=registry,
        )
        self._scored = Counter("sella_shadow_scored_total", "Requests scored by the shadow too.", registry=registry)
        self._dropped = Counter(
            "sella_shadow_dropped_total",
            "Sampled requests that the shadow did not score: others computed, or it failed.",
            registry=registry,
        )
        for outcome in OUTCOMES:  # exist from the start, so that a rate over them does too
            self._changes.labels(outcome)

    def serves(self, bundle_id: str, merged_id: str, role: str, *, serves: bool) -> None:
        """Name a bundle that has a role now, or has it no more."""
        if serves:
            self._info.labels(bundle_id, merged_id, role).set(1)
            if role == "shadow":
                self._difference.labels(bundle_id[:12])
        else:
            self._info.remove(bundle_id, merged_id, role)

    def switched(self, seconds: float) -> None:
        """Count a change that was made."""
        self._changes.labels("switched").inc()
        self._seconds.observe(seconds)

    def refused(self) -> None:
        """Count a change that was refused."""
        self._changes.labels("refused").inc()

    def fell_back(self) -> None:
        """Count a request of the canary's that the current bundle answers."""
        self._fallbacks.inc()

    def shadow_scored(self, bundle_id: str, differences: list[float]) -> None:
        """Count a request scored by the shadow, and each candidate's difference."""
        self._scored.inc()
        of_bundle = self._difference.labels(bundle_id[:12])
        for one in differences:
            of_bundle.observe(one)

    def shadow_dropped(self) -> None:
        """Count a sampled request that the shadow did not score."""
        self._dropped.inc()

    def freed(self, bundle_id: str) -> None:
        """Remove what is told of a bundle that is freed."""
        with suppress(KeyError):  # it was never a shadow
            self._difference.remove(bundle_id[:12])
