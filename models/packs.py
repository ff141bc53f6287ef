"""What several prompts share, and what each has alone.

A trunk holds what several prompts share: the instruction and the history. Each branch attends to the first `attach`
trunk tokens and to itself, and its positions go on from `attach`, so every branch sees exactly the prompt it would
see alone. A branch may attach anywhere: prompts whose history only grows at its end share one trunk too. Exact for
causal attention, which `models.probe` checks on every backbone that is loaded.

Shapes: K candidates, C = d_C, D = d_L.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.segments import Segment

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Branch:
    """One prompt's own part: its segment, and how many trunk tokens precede it."""

    attach: int
    segment: Segment


@dataclass(frozen=True, slots=True)
class Pack:
    """A trunk and the branches that share it."""

    trunk: Segment
    branches: tuple[Branch, ...]

    @property
    def tokens(self) -> int:
        """How many tokens one forward computes for this pack."""
        return len(self.trunk) + sum(len(branch.segment) for branch in self.branches)

    @property
    def tokens_alone(self) -> int:
        """How many tokens its prompts would take one by one."""
        return sum(branch.attach + len(branch.segment) for branch in self.branches)


def room(trunk_tokens: int, max_tokens: int) -> int:
    """Return the tokens of a forward that begins with a trunk: half of `max_tokens` is always left for its branches.

    Otherwise a trunk as long as `max_tokens` would make one forward for each branch.
    """
    return max(max_tokens, trunk_tokens + max_tokens // 2)


def split_pack(pack: Pack, max_tokens: int) -> Iterator[tuple[Pack, range]]:
    """Split a pack's branches so that no part exceeds `max_tokens`, or the `room` behind a long trunk.

    Yields each part and its branches' indices. A part has at least one branch, however long.
    """
    start, tokens, most = 0, len(pack.trunk), room(len(pack.trunk), max_tokens)
    for index, branch in enumerate(pack.branches):
        if index > start and tokens + len(branch.segment) > most:
            yield Pack(pack.trunk, pack.branches[start:index]), range(start, index)
            start, tokens = index, len(pack.trunk)
        tokens += len(branch.segment)
    yield Pack(pack.trunk, pack.branches[start:]), range(start, len(pack.branches))


@dataclass(frozen=True, slots=True)
class ScoringGroup:
    """One user's prompt trunk, the candidates behind it, and the vectors of its slots: a plain message."""

    pack: Pack
    user_1C: Floats
    item_KC: Floats
    semantic_KD: Floats

    def __post_init__(self) -> None:
        """Raise ValueError where a candidate lacks a vector, or where bytes would not tell vectors apart."""
        candidates = len(self.pack.branches)
        for name, rows in (("user_1C", 1), ("item_KC", candidates), ("semantic_KD", candidates)):
            vectors = getattr(self, name)
            if vectors.ndim != 2 or len(vectors) != rows or vectors.dtype != np.float32 or not rows:
                raise ValueError(f"{name}: {vectors.dtype} of shape {vectors.shape}; need float32, {rows} rows")

    def parts(self, max_tokens: int) -> Iterator["ScoringGroup"]:
        """Yield the group cut by `split_pack`, candidates in order, each part with the whole trunk."""
        for pack, where in split_pack(self.pack, max_tokens):
            rows = slice(where.start, where.stop)
            yield ScoringGroup(pack, self.user_1C, self.item_KC[rows], self.semantic_KD[rows])
