"""Who is let into the queue: those who can be answered in time without making others late."""

import math
import time

from service.pace import Pace
from service.waiting import Waiting

# A request may be overtaken by shorter ones that come within so many times its own work's duration.
PATIENCE = 4.0
# Of the time until its deadline, what a request must be expected to need at most: a pace is an estimate.
SAFETY = 0.8
# Requests over which the mean size of a candidate is taken.
MEMORY = 50


class QueueFullError(Exception):
    """Refused at once: what waits already would not leave enough time. `retry_after_s` is a guess at when it would."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Admission:
    """Judges requests by their size, by what waits, and by the pace of the batches so far."""

    def __init__(self, waiting: Waiting, pace: Pace, queue_tokens: int, batch_tokens: int) -> None:
        self._waiting = waiting
        self._pace = pace
        self._queue_tokens = queue_tokens
        self._batch_tokens = batch_tokens
        self._tokens_a_candidate: float | None = None

    def seconds(self, tokens: int) -> float:
        """Return how long so many tokens are expected to take; 0 before any were measured."""
        return self._pace.seconds(tokens, self._batch_tokens)

    def due(self, tokens: int, now: float) -> float:
        """Return a request's place in the order of the queue."""
        return now + PATIENCE * self.seconds(tokens)

    def remember(self, tokens: int, candidates: int) -> None:
        """Learn how large a candidate is."""
        size = tokens / candidates
        known = size if self._tokens_a_candidate is None else self._tokens_a_candidate
        self._tokens_a_candidate = known + (size - known) / MEMORY

    def likely_tokens(self, candidates: int) -> int:
        """Return how large a request of so many candidates will be, as sizes have been lately."""
        return round(candidates * (self._tokens_a_candidate or 0.0))

    def judge(self, tokens: int, deadline: float, busy_until: float) -> None:
        """Refuse what would be late or make others late. Where nothing waits or runs any one passes, however long.

        Raises:
            QueueFullError: refused.
        """
        now = time.monotonic()
        if not self._waiting and busy_until <= now:
            return
        over = self._waiting.tokens + tokens - self._queue_tokens
        if self._waiting and over > 0:
            wait_s = max(1, math.ceil(self.seconds(over)))
            raise QueueFullError(f"{over} tokens more than the {self._queue_tokens} that may wait", wait_s)
        late = self._late_by(tokens, deadline, busy_until - now, now)
        if late > 0:
            raise QueueFullError(f"it would be late by {late:.3g} s", max(1, math.ceil(late)))

    def _late_by(self, tokens: int, deadline: float, busy: float, now: float) -> float:
        """Return by how much the new request would miss its deadline, or make one that waits miss its own."""
        if not self._pace.known:
            return 0.0
        due = self.due(tokens, now)
        before = sum(entry.tokens for entry in self._waiting if entry.due <= due)
        late = busy + self.seconds(before + tokens) - SAFETY * (deadline - now)
        passed = 0
        for entry in self._waiting:
            passed += entry.tokens
            if entry.due > due:
                left = SAFETY * (entry.job.deadline - now) - busy
                if self.seconds(passed) <= left < self.seconds(passed + tokens):
                    late = max(late, self.seconds(passed + tokens) - left)
        return late
