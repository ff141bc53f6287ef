"""The reference score: one pair, one prompt, one forward (Eqs. 1-3, 10).

Slow, obvious, never optimised. Every faster path is tested against it.
"""

import torch

from models.backbone import Backbone
from models.projection import Projections
from models.segments import Segment, SlotKind


def score(
    backbone: Backbone,
    prompt: Segment,
    projections: Projections | None = None,
    vectors: dict[SlotKind, torch.Tensor] | None = None,
) -> float:
    """Return p = softmax over the Yes and No logits at the prompt's last position (Eq. 3): the logit's sigmoid."""
    return float(torch.tensor(logit(backbone, prompt, projections, vectors), dtype=torch.float64).sigmoid())


@torch.no_grad()
def logit(
    backbone: Backbone,
    prompt: Segment,
    projections: Projections | None = None,
    vectors: dict[SlotKind, torch.Tensor] | None = None,
) -> float:
    """Return the Yes logit minus the No logit at the prompt's last position.

    `vectors` holds the unprojected vector of each slot kind: `(C,)` for user and item, `(D,)` for warm. The forward is
    the model's own, with its own mask and its own full head.
    """
    token_ids = torch.tensor([prompt.token_ids], device=backbone.device)
    embeds = backbone.embed(token_ids)
    for kind, index in prompt.slots:
        if projections is None or vectors is None:
            raise ValueError("the prompt has slots but no vectors were given")
        project = projections.warm if kind is SlotKind.WARM else projections.collab
        embeds[0, index] = project(vectors[kind].to(backbone.device)).to(embeds.dtype)
    logits = backbone.causal_lm(inputs_embeds=embeds, use_cache=False).logits[0, -1].float()
    return float(logits[backbone.answers.yes].double() - logits[backbone.answers.no].double())
