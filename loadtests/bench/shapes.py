"""What is measured: models by their shape, prompts by theirs, and requests made of random tokens and vectors.

Speed depends on shapes alone, so the weights are random: nothing has to be downloaded, and every machine can repeat it.
"""

from dataclasses import dataclass

import numpy as np

from models.packs import Branch, Pack, ScoringGroup
from models.segments import Segment, SlotKind

D_COLLAB, D_HIDDEN = 64, 256
YES, NO = 1, 2  # token ids of the answers; which two they are makes no difference to speed


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Qwen2's sizes and its weights' type."""

    name: str
    d_model: int
    d_inner: int
    layers: int
    heads: int
    shared_heads: int
    vocabulary: int
    tied: bool
    dtype: str


MODELS = {
    one.name: one
    for one in (
        ModelShape("tiny", 256, 1024, 4, 4, 2, 4096, True, "float32"),
        ModelShape("qwen2-0.5b", 896, 4864, 24, 14, 2, 151_936, True, "bfloat16"),
        ModelShape("qwen2-7b", 3584, 18_944, 28, 28, 4, 152_064, False, "bfloat16"),
    )
}


@dataclass(frozen=True, slots=True)
class PromptShape:
    """How many tokens a user segment and a candidate have."""

    name: str
    user_tokens: int
    candidate_tokens: int
    candidates: tuple[int, ...]


SHAPES = {
    one.name: one
    for one in (
        PromptShape("ten-titles", 330, 16, (1, 10, 100, 1000)),
        PromptShape("sglang", 120, 180, (10,)),  # that project's multi-item benchmark
    )
}


def request(model: ModelShape, shape: PromptShape, candidates: int, user: int, draw: int) -> ScoringGroup:
    """Return a request: users differ in text and vectors, draws of one user in the candidates alone."""
    of_user, of_draw = (
        np.random.default_rng([shape.user_tokens, user]),
        np.random.default_rng([shape.candidate_tokens, user, draw]),
    )

    def tokens(rng: np.random.Generator, count: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, model.vocabulary, count).tolist())

    trunk = Segment(tokens(of_user, shape.user_tokens), ((SlotKind.USER, shape.user_tokens - 12),))
    slots = ((SlotKind.ITEM, 0), (SlotKind.WARM, 1))
    branches = tuple(
        Branch(shape.user_tokens, Segment(tokens(of_draw, shape.candidate_tokens), slots)) for _ in range(candidates)
    )
    return ScoringGroup(
        Pack(trunk, branches),
        of_user.normal(size=(1, D_COLLAB)).astype(np.float32),
        of_draw.normal(size=(candidates, D_COLLAB)).astype(np.float32),
        of_draw.normal(size=(candidates, model.d_model)).astype(np.float32),
    )
