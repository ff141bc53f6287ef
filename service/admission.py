"""Who is let into the queue: those who can be answered in time without making others late."""

import math
import time
from collections.abc import Sequence

from models.packs import ScoringGroup
from service.pace import Pace
from service.waiting import Waiting

# A request may be overtaken by shorter ones that come within so many times its own work's duration.
PATIENCE = 4.0
# Of the time until its deadline, what a request must be expected to need at most: a pace is an estimate.
SAFETY = 0.8
# Requests over which the usual sizes of user segments and candidates are taken.
MEMORY = 50
# The longest that a client is told to wait: by then the queue is another.
LONGEST_RETRY_S = 60


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
        self.reserved = 0  # tokens that will come from requests of which a part is being computed
        self._usual_trunk = self._usual_candidate = 0.0
        self._remembered = 0

    def seconds(self, tokens: int) -> float:
        """Return how long so many tokens are expected to take; 0 before enough were measured."""
        return self._pace.seconds(tokens, self._batch_tokens)

    def due(self, tokens: int, deadline: float, now: float) -> float:
        """Return a request's place in the order of the queue, its deadline at the latest."""
        return now + min(PATIENCE * self.seconds(tokens), max(0.0, deadline - now))

    def remember(self, groups: Sequence[ScoringGroup]) -> None:
        """Learn how large user segments and candidates are."""
        candidates = sum(len(group.pack.branches) for group in groups)
        trunks = sum(len(group.pack.trunk) for group in groups)
        own = sum(group.pack.tokens for group in groups) - trunks
        self._remembered = min(self._remembered + 1, MEMORY)
        self._usual_trunk += (trunks / len(groups) - self._usual_trunk) / self._remembered
        self._usual_candidate += (own / candidates - self._usual_candidate) / self._remembered

    def usual_tokens(self, groups: int, candidates: int) -> int:
        """Return how large a request of so many groups and candidates is, as sizes have been lately."""
        return round(groups * self._usual_trunk + candidates * self._usual_candidate)

    def judge(self, tokens: int, deadline: float, busy_until: float) -> None:
        """Refuse what would be late or make others late. Where nothing waits or runs any one passes, however long.

        Raises:
            QueueFullError: refused.
        """
        now = time.monotonic()
        ahead = self._waiting.tokens + self.reserved
        if not ahead and busy_until <= now:
            return
        over = ahead + tokens - self._queue_tokens
        if ahead and over > 0:
            raise QueueFullError(f"{over} tokens over the {self._queue_tokens} that may wait", self._retry(over))
        late = self._late_by(tokens, deadline, busy_until - now, now)
        if late > 0:
            raise QueueFullError(f"it would be late by {late:.3g} s", _whole_seconds(late))

    def _retry(self, over: int) -> int:
        """Return when so many tokens will have left the queue; what could never wait may pass once it is empty."""
        return _whole_seconds(self.seconds(min(over, self._waiting.tokens)))

    def _late_by(self, tokens: int, deadline: float, busy: float, now: float) -> float:
        """Return by how much the new request would miss its deadline, or make one that waits miss its own."""
        if not self._pace.known:
            return 0.0
        due = self.due(tokens, deadline, now)
        before = self.reserved + sum(entry.tokens for entry in self._waiting if entry.due <= due)
        late = busy + self.seconds(before + tokens) - SAFETY * (deadline - now)
        passed = 0
        for entry in self._waiting:
            passed += entry.tokens
            if entry.due > due:
                left = SAFETY * (entry.job.deadline - now) - busy
                if self.seconds(passed) <= left < self.seconds(passed + tokens):
                    late = max(late, self.seconds(passed + tokens) - left)
        return late


def _whole_seconds(seconds: float) -> int:
    return min(LONGEST_RETRY_S, max(1, math.ceil(seconds)))
