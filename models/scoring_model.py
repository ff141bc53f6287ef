"""A backbone with its projections: what an engine holds, and what evaluation runs.

Shapes: K candidates, D = d_L.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np
import torch
from numpy.typing import NDArray

from models.assembly import ScoringGroup
from models.backbone import Backbone
from models.packed import Branch, Pack, SlotVectors, lay_out, packed_logits
from models.projection import Projections
from models.template import Segment

Floats = NDArray[np.float32]


class NotFiniteError(ArithmeticError):
    """A score came out as NaN or infinite."""


class ScoringModel:
    """Scores groups and distils titles with frozen weights."""

    def __init__(self, backbone: Backbone, projections: Projections) -> None:
        self.backbone = backbone
        self.projections = projections.to(backbone.device).eval()

    @torch.inference_mode()
    def score(self, groups: Sequence[ScoringGroup], max_tokens: int = 4096) -> list[Floats]:
        """Return each group's probabilities, `(K,)` in candidate order, before calibration.

        A group longer than `max_tokens` takes several forwards, each repeating its trunk; shorter ones share forwards.

        Raises:
            NotFiniteError: a score is not finite; names the group.
        """
        probabilities = [np.empty(len(group.pack.branches), np.float32) for group in groups]
        parts = chain.from_iterable(map(_parts, groups, probabilities, repeat(max_tokens)))
        for batch in _batches(parts, max_tokens):
            scores = self._forward([part.scored for part in batch]).sigmoid().cpu().numpy()
            start = 0
            for part in batch:
                end = start + len(part.probabilities_K)
                part.probabilities_K[:] = scores[start:end]
                start = end
        for index, scores in enumerate(probabilities):
            if not np.isfinite(scores).all():
                raise NotFiniteError(f"group {index}: {int((~np.isfinite(scores)).sum())} scores are not finite")
        return probabilities

    def distil(self, prompts: Sequence[Segment], max_tokens: int = 4096) -> Floats:
        """Return the semantic vector of each prompt of Fig. 3, `(N, D)` fp32."""
        return distil(self.backbone, prompts, max_tokens)

    def _forward(self, groups: Sequence[ScoringGroup]) -> torch.Tensor:
        device = self.backbone.device
        vectors = SlotVectors(
            user_UC=torch.from_numpy(np.concatenate([group.user_1C for group in groups])).to(device),
            item_KC=torch.from_numpy(np.concatenate([group.item_KC for group in groups])).to(device),
            semantic_KD=torch.from_numpy(np.concatenate([group.semantic_KD for group in groups])).to(device),
        )
        batch = lay_out([group.pack for group in groups]).to(device)
        return packed_logits(self.backbone, batch, self.projections, vectors)


@torch.inference_mode()
def distil(backbone: Backbone, prompts: Sequence[Segment], max_tokens: int = 4096) -> Floats:
    """Return the last hidden state of each prompt, `(N, D)` fp32: an item's semantic vector (Fig. 3)."""
    out = np.empty((len(prompts), backbone.d_model), np.float32)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    start = 0
    while start < len(order):
        # Neighbours in length share a batch; nothing attends to padding, so a vector does not depend on them.
        end = start + 1
        while end < len(order) and (end + 1 - start) * len(prompts[order[end]]) <= max_tokens:
            end += 1
        chosen = order[start:end]
        packs = [Pack(Segment(()), (Branch(0, prompts[index]),)) for index in chosen]
        batch = lay_out(packs).to(backbone.device)
        hidden_BTD = backbone.hidden(backbone.embed(batch.token_ids_BT), batch.position_ids_BT, batch.attention_B1TT)
        out[chosen] = hidden_BTD[batch.answers_K2[:, 0], batch.answers_K2[:, 1]].float().cpu().numpy()
        start = end
    return out


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a group, and where its scores go."""

    scored: ScoringGroup
    probabilities_K: Floats  # a view into the group's own


def _batches(parts: Iterable[_Part], max_tokens: int) -> list[list[_Part]]:
    """Fill forwards with parts of like length."""
    batches: list[list[_Part]] = []
    for part in sorted(parts, key=lambda part: part.scored.pack.tokens):
        # Sorted by length, so a batch costs its newest part's tokens times its rows.
        if batches and (len(batches[-1]) + 1) * part.scored.pack.tokens <= max_tokens:
            batches[-1].append(part)
        else:
            batches.append([part])
    return batches


def _parts(group: ScoringGroup, probabilities_K: Floats, max_tokens: int) -> Iterator[_Part]:
    start = 0
    for part in group.parts(max_tokens):
        end = start + len(part.pack.branches)
        yield _Part(part, probabilities_K[start:end])
        start = end
