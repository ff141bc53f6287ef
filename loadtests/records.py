"""What became of each request, and what a run of them amounts to."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

OK = 200
NO_ANSWER = 0
REFUSALS = (429, 503, 504)
HOLDS = 0.99  # "p99 within the limit" is: at least this share of all requests answered within it


@dataclass(frozen=True, slots=True)
class Answer:
    """What a service said: the status, or `NO_ANSWER`, and its own timings in seconds."""

    status: int
    timings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """One request; times are seconds after the run began."""

    scheduled: float
    sent: float
    done: float
    answer: Answer
    candidates: int = 1

    @property
    def latency_s(self) -> float:
        """From the scheduled arrival: a request that the generator sent late has waited all the same."""
        return self.done - self.scheduled

    @property
    def ok(self) -> bool:
        """Whether it was scored."""
        return self.answer.status == OK

    def in_time(self, limit_s: float) -> bool:
        """Whether it was scored within the limit."""
        return self.ok and self.latency_s <= limit_s


@dataclass(frozen=True)
class Summary:
    """A run in figures. Quantiles are of scored requests; `in_time` is a share of all that were due."""

    requests: int
    offered_rate: float
    goodput: float  # scored within the limit, a second
    in_time: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    refused: dict[str, int]  # by status
    failed: int  # any other answer, or none
    sent_late_p99_ms: float  # the generator's own lateness: if this is not small, the figures are the generator's

    @property
    def holds(self) -> bool:
        """Whether the p99 of all requests, with those not scored as the slowest, is within the limit."""
        return self.requests > 0 and self.in_time >= HOLDS

    def row(self) -> dict[str, Any]:
        """Return it as a line of a table."""
        refused = " ".join(f"{status}:{count}" for status, count in self.refused.items())
        return {
            "due/s": self.offered_rate,
            "good/s": self.goodput,
            "in time": f"{self.in_time:.1%}",
            "p50 ms": self.p50_ms,
            "p95 ms": self.p95_ms,
            "p99 ms": self.p99_ms,
            "refused": refused or "0",
            "failed": self.failed,
            "sent late p99 ms": self.sent_late_p99_ms,
        }


def summarize(records: Sequence[Record], seconds: float, limit_s: float) -> Summary:
    """Sum up the requests that were due in `seconds`."""
    statuses = Counter(record.answer.status for record in records)
    latencies = [record.latency_s for record in records if record.ok]
    good = sum(record.in_time(limit_s) for record in records)
    p50, p95, p99 = (quantile_ms(latencies, q) for q in (0.5, 0.95, 0.99))
    return Summary(
        requests=len(records),
        offered_rate=len(records) / seconds,
        goodput=good / seconds,
        in_time=good / len(records) if records else 0.0,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        refused={str(status): statuses[status] for status in REFUSALS if statuses[status]},
        failed=sum(count for status, count in statuses.items() if status != OK and status not in REFUSALS),
        sent_late_p99_ms=quantile_ms([record.sent - record.scheduled for record in records], 0.99) or 0.0,
    )


def quantile_ms(seconds: Sequence[float], q: float) -> float | None:
    """Return a quantile in milliseconds, one of the values themselves; None of nothing."""
    if not seconds:
        return None
    return 1000 * float(np.quantile(np.asarray(seconds), q, method="inverted_cdf"))
