"""Metrics of interactions: what was taken, how the log fares, and how far the shared store is behind it."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

OUTCOMES = ("accepted", "duplicate", "forgotten", "refused")

# From a write into a disk's cache to a disk that hardly answers.
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class InteractionMetrics:
    """Counts each interaction, expiry and deletion once."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._interactions = Counter(
            "sella_interactions_total", "Interactions sent, by what became of each.", ["outcome"], registry=registry
        )
        self._expired = Counter(
            "sella_impressions_expired_total", "Impressions without an outcome in time: negatives.", registry=registry
        )
        self._append = Histogram(
            "sella_log_append_seconds", "From a batch to its being on disk.", buckets=_SECONDS, registry=registry
        )
        self._up = Gauge("sella_log_up", "1 while the log takes interactions.", registry=registry)
        self._entries = Gauge("sella_log_entries", "Entries in the log.", registry=registry)
        self._lag = Gauge(
            "sella_replay_lag_entries", "Entries of the log that the shared store has not applied.", registry=registry
        )
        self._lost = Counter(
            "sella_replay_lost_total", "Times that the shared store was found to have lost data.", registry=registry
        )
        self._deleted = Counter("sella_users_deleted_total", "Deletions of users asked for here.", registry=registry)
        self._live = Counter(
            "sella_live_histories_total", "Histories scored with likes beyond the bundle's.", registry=registry
        )
        for outcome in OUTCOMES:  # exist from the start, so that a rate over them does too
            self._interactions.labels(outcome)

    def taken(self, outcomes: Sequence[str]) -> None:
        """Count what became of the interactions of one batch."""
        for outcome in OUTCOMES:
            if number := outcomes.count(outcome):
                self._interactions.labels(outcome).inc(number)

    def refused(self, interactions: int) -> None:
        """Count the interactions of a batch of which nothing was taken."""
        self._interactions.labels("refused").inc(interactions)

    def expired(self, impressions: int) -> None:
        """Count impressions that became negatives because nothing was heard of them."""
        self._expired.inc(impressions)

    def appended(self, seconds: float) -> None:
        """Record how long a batch took to be on disk."""
        self._append.observe(seconds)

    def log(self, up: bool, entries: int | None) -> None:
        """Record whether the log takes entries, and how many it holds if that is known."""
        self._up.set(int(up))
        if entries is not None:
            self._entries.set(entries)

    def lag(self, entries: int) -> None:
        """Record how many entries the shared store has not applied."""
        self._lag.set(entries)

    def lost(self) -> None:
        """Count that the shared store has lost data."""
        self._lost.inc()

    def deleted(self) -> None:
        """Count a user's deletion."""
        self._deleted.inc()

    def live(self, histories: int) -> None:
        """Count scored histories that live likes are part of."""
        self._live.inc(histories)
