"""The load-time probe: does this architecture score the way sella computes it?

Two-row logits ignore caps and scales that some architectures put on their final logits; packed prompts are exact for
plain causal attention with explicit positions, not for sliding windows, ALiBi and the like. Rather than keep a list of
architectures, each loaded backbone is compared with its own full forward, and refused where they differ.
"""

import torch

from models.backbone import Backbone, BackboneError
from models.packed import PackedModel, Part, Row
from models.packs import Branch, Pack
from models.prompt_tree import TreeModel, lay_out
from models.segments import Segment

# Longer than any prompt the template makes by default, so that a sliding window shorter than a prompt shows.
TRUNK_TOKENS = 96
BRANCH_TOKENS = (5, 17, 11)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}


@torch.no_grad()
def probe(backbone: Backbone, trunk_tokens: int = TRUNK_TOKENS) -> float:
    """Compare packed two-row logits with the model's own forward; return the largest difference, in logits.

    Raises:
        BackboneError: they differ beyond rounding; sella cannot score with this architecture.
    """
    kind = type(backbone.causal_lm).__name__
    pack = _random_pack(backbone, trunk_tokens)
    try:
        tree = TreeModel(backbone).logits(lay_out([pack, pack]).to(backbone.device)).tolist()
        packed = _packed_logits(backbone, pack)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BackboneError(
            f"{kind}: it does not take embeddings with positions and an attention function: {error}"
        ) from error
    worst = 0.0
    for branch, *ours in zip(pack.branches * 2, tree, packed * 2, strict=True):
        prompt = pack.trunk.token_ids[: branch.attach] + branch.segment.token_ids
        logits = backbone.causal_lm(torch.tensor([prompt], device=backbone.device), use_cache=False).logits[0, -1]
        own = float(logits[backbone.answers.yes].float() - logits[backbone.answers.no].float())
        worst = max(worst, *(abs(own - one) for one in ours))
    if not worst <= TOLERANCE[backbone.dtype]:
        raise BackboneError(
            f"{kind}: packed two-row logits differ from the model's own by {worst:.3g}; its attention or its head does"
            " more than plain causal attention and a linear layer (soft cap, sliding window, ALiBi?), so sella cannot"
            " use it"
        )
    return worst


def _packed_logits(backbone: Backbone, pack: Pack) -> list[float]:
    """Return what `models.packed` makes of each branch, the trunk cut where the branch attaches."""
    parts = [Part(Segment(pack.trunk.token_ids[: one.attach]), (one.segment,)) for one in pack.branches]
    row = Row.of(parts, backbone.device)
    hidden_KD = PackedModel(backbone).hidden(row, backbone.embed(row.token_ids_T))
    logits: list[float] = backbone.answer_logits(hidden_KD).tolist()
    return logits


def _random_pack(backbone: Backbone, trunk_tokens: int) -> Pack:
    generator = torch.Generator().manual_seed(0)
    vocabulary = backbone.causal_lm.get_input_embeddings().num_embeddings

    def segment(length: int) -> Segment:
        return Segment(tuple(torch.randint(vocabulary, (length,), generator=generator).tolist()))

    attach = (trunk_tokens, trunk_tokens, trunk_tokens // 2)
    branches = tuple(Branch(at, segment(n)) for at, n in zip(attach, BRANCH_TOKENS, strict=True))
    return Pack(segment(trunk_tokens), branches)
