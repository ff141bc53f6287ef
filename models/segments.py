"""Tokens with slots: what prompts are made of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum


class SlotKind(StrEnum):
    """A prompt position that takes a projected vector in place of a token's embedding."""

    USER = "<User_ID>"
    ITEM = "<Item_ID>"
    WARM = "<Warm_ID>"


@dataclass(frozen=True, slots=True)
class Segment:
    """Token ids and the slots among them, as (kind, index into token_ids)."""

    token_ids: tuple[int, ...]
    slots: tuple[tuple[SlotKind, int], ...] = ()

    def __add__(self, other: "Segment") -> "Segment":
        shift = len(self.token_ids)
        moved = tuple((kind, index + shift) for kind, index in other.slots)
        return Segment(self.token_ids + other.token_ids, self.slots + moved)

    def __len__(self) -> int:
        return len(self.token_ids)


def fill(prompts: Sequence[Segment], max_tokens: int) -> Iterator[tuple[Segment, ...]]:
    """Yield the prompts in order, as many together as `max_tokens` hold; a longer one stands alone."""
    together: list[Segment] = []
    tokens = 0
    for prompt in prompts:
        if together and tokens + len(prompt) > max_tokens:
            yield tuple(together)
            together, tokens = [], 0
        together.append(prompt)
        tokens += len(prompt)
    if together:
        yield tuple(together)
