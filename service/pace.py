"""How long batches take here: learned from those that were computed, never assumed."""

from dataclasses import dataclass

MEMORY = 0.9  # weight that one batch leaves of what was learned before: some ten batches are remembered
LEAST_SPREAD = 1e-3  # variance over squared mean of the sizes seen; below it they tell nothing of a cost by token
LEAST_BATCHES = 3  # before so many nothing is known: a first batch may pay for what later ones find done
FREAK = 3.0  # a batch that takes more than so many times what was expected counts as so many times


@dataclass(slots=True)
class Pace:
    """Seconds of a batch as a line in its tokens, fitted to recent batches by least squares.

    Where it cannot know it expects little: work is refused by what is expected here, and what is never tried is never
    learned.
    """

    _batches: int = 0
    _weight: float = 0.0
    _tokens: float = 0.0
    _seconds: float = 0.0
    _tokens_squared: float = 0.0
    _tokens_seconds: float = 0.0

    @property
    def known(self) -> bool:
        """Whether enough batches were measured."""
        return self._batches >= LEAST_BATCHES

    def record(self, tokens: int, seconds: float) -> None:
        """Learn from a batch."""
        if self.known:
            fixed, each = self._line()
            seconds = min(seconds, FREAK * (fixed + each * tokens))
        self._batches += 1
        self._weight = MEMORY * self._weight + 1
        self._tokens = MEMORY * self._tokens + tokens
        self._seconds = MEMORY * self._seconds + seconds
        self._tokens_squared = MEMORY * self._tokens_squared + tokens * tokens
        self._tokens_seconds = MEMORY * self._tokens_seconds + tokens * seconds

    def seconds(self, tokens: float, batch_tokens: int) -> float:
        """Return how long so many tokens take in batches of that size; 0 before enough was measured."""
        if not self.known or tokens <= 0:
            return 0.0
        fixed, each = self._line()
        return fixed * max(1.0, tokens / batch_tokens) + each * tokens

    def _line(self) -> tuple[float, float]:
        """Return the fixed seconds of a batch and the seconds of a token, neither below zero."""
        mean_tokens, mean_seconds = self._tokens / self._weight, self._seconds / self._weight
        variance = self._tokens_squared / self._weight - mean_tokens**2
        if variance < LEAST_SPREAD * mean_tokens**2:
            return mean_seconds, 0.0
        each = (self._tokens_seconds / self._weight - mean_tokens * mean_seconds) / variance
        fixed = mean_seconds - each * mean_tokens
        if each < 0:
            return mean_seconds, 0.0
        return (fixed, each) if fixed >= 0 else (0.0, mean_seconds / mean_tokens)
