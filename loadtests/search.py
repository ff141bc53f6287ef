"""The search for the highest rate that holds: bracket by doubling, then bisect."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from loadtests.records import Summary

Measure = Callable[[float], Awaitable[Summary]]


@dataclass
class Found:
    """What a search has found so far."""

    rate: float = 0.0  # the highest that held; 0 if none did
    fails: float = 0.0  # the lowest that did not; 0 if every one held, and `rate` is then only a lower bound
    steps: list[tuple[float, Summary]] = field(default_factory=list)  # in order

    @property
    def bracketed(self) -> bool:
        """Whether the capacity lies between two rates that were measured."""
        return bool(self.rate and self.fails)


@dataclass(frozen=True)
class Search:
    """How to search. Every step is one run of `Measure`, so `most_steps` bounds the time."""

    first_rate: float = 8.0
    precision: float = 0.1  # stop when the rate that fails is at most this share above the one that holds
    most_steps: int = 14

    async def highest(self, measure: Measure) -> Found:
        """Return the highest rate found to hold, and every step."""
        found = Found()
        for _ in range(self.most_steps):
            if found.bracketed and found.fails / found.rate <= 1 + self.precision:
                break
            rate = self._next(found)
            summary = await measure(rate)
            found.steps.append((rate, summary))
            if summary.holds:
                found.rate = rate
            else:
                found.fails = rate
        return found

    def _next(self, found: Found) -> float:
        """Return the next rate to try."""
        if found.bracketed:
            return float((found.rate * found.fails) ** 0.5)  # the middle of the logarithms: precision is a ratio
        if found.fails:
            return found.fails / 2
        return 2 * found.rate if found.rate else self.first_rate
