"""What is compared. Each takes a request and returns the probability of Yes of every candidate.

Shapes: K candidates, B prompts of a batch, T tokens of the longest, D = d_L.
"""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from models import scorer
from models.backbone import Backbone
from models.packs import ScoringGroup
from models.projection import Projections
from models.scoring_model import ScoringModel
from models.segments import Segment, SlotKind

Floats = NDArray[np.float32]

NAIVE_BATCH = 16  # the fastest of 4, 16 and 64 on two CPU cores; on a GPU all are much alike
BATCH_TOKENS = 2048  # the service's default
CACHE_BYTES = 2**30  # likewise


class Scorer(Protocol):
    """A way to score."""

    def score(self, group: ScoringGroup) -> Floats:
        """Return the probabilities, (K,)."""
        ...

    def tokens(self) -> int:
        """Return how many tokens were computed so far."""
        ...


class Reference:
    """One prompt, one forward, by `models.scorer`."""

    def __init__(self, backbone: Backbone, projections: Projections) -> None:
        self._backbone, self._projections = backbone, projections
        self._tokens = 0

    def score(self, group: ScoringGroup) -> Floats:
        """Score the candidates one by one."""
        scores = []
        for index, branch in enumerate(group.pack.branches):
            prompt = group.pack.trunk + branch.segment
            vectors = _vectors(group, index)
            scores.append(scorer.score(self._backbone, prompt, self._projections, vectors))
            self._tokens += len(prompt)
        return np.array(scores, np.float32)

    def tokens(self) -> int:
        """Return how many tokens were computed so far."""
        return self._tokens


class Naive:
    """What one would write: batches of whole prompts, padded on the left, through the whole model and its full head."""

    def __init__(self, backbone: Backbone, projections: Projections) -> None:
        self._backbone, self._projections = backbone, projections
        self._tokens = 0

    @torch.inference_mode()
    def score(self, group: ScoringGroup) -> Floats:
        """Score the candidates batch by batch."""
        branches = range(len(group.pack.branches))
        batches = [branches[start : start + NAIVE_BATCH] for start in range(0, len(branches), NAIVE_BATCH)]
        return np.concatenate([self._batch(group, batch) for batch in batches])

    def tokens(self) -> int:
        """Return how many tokens were computed so far, padding too."""
        return self._tokens

    def _batch(self, group: ScoringGroup, candidates: range) -> Floats:
        prompts = [group.pack.trunk + group.pack.branches[index].segment for index in candidates]
        width = max(map(len, prompts))
        embeds_BTD = torch.stack([self._embed(group, i, p, width) for i, p in zip(candidates, prompts, strict=True)])
        mask_BT = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
        logits = self._backbone.causal_lm(
            inputs_embeds=embeds_BTD, attention_mask=mask_BT.to(embeds_BTD.device), use_cache=False
        ).logits[:, -1]
        answers = [self._backbone.answers.yes, self._backbone.answers.no]
        self._tokens += embeds_BTD.shape[0] * width
        scores: Floats = logits[:, answers].float().softmax(-1)[:, 0].cpu().numpy()
        return scores

    def _embed(self, group: ScoringGroup, index: int, prompt: Segment, width: int) -> torch.Tensor:
        ids = [0] * (width - len(prompt)) + list(prompt.token_ids)
        embeds_TD = self._backbone.embed(torch.tensor(ids, device=self._backbone.device))
        vectors = _vectors(group, index)
        for kind, place in prompt.slots:
            project = self._projections.warm if kind is SlotKind.WARM else self._projections.collab
            embeds_TD[width - len(prompt) + place] = project(vectors[kind].to(embeds_TD.device)).to(embeds_TD.dtype)
        return embeds_TD


class Packed:
    """The packed engine's model, with its cache."""

    def __init__(
        self, backbone: Backbone, projections: Projections, *, fp8: bool = False, compiled: bool = False
    ) -> None:
        self.model = ScoringModel(
            backbone, projections, identity="bench", cache_bytes=CACHE_BYTES, fp8=fp8, compiled=compiled
        )

    def score(self, group: ScoringGroup) -> Floats:
        """Score a list in forwards of the service's default size."""
        return self.model.score([group], BATCH_TOKENS)[0].astype(np.float32)

    def tokens(self) -> int:
        """Return how many tokens were computed so far."""
        return self.model.counts.tokens


def _vectors(group: ScoringGroup, index: int) -> dict[SlotKind, torch.Tensor]:
    return {
        SlotKind.USER: torch.from_numpy(group.user_1C[0]),
        SlotKind.ITEM: torch.from_numpy(group.item_KC[index]),
        SlotKind.WARM: torch.from_numpy(group.semantic_KD[index]),
    }
