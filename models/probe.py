"""The load-time probe: does this architecture score the way sella computes it?

Two-row logits ignore caps and scales that some architectures put on their final logits; packed prompts are exact for
plain causal attention with explicit positions, not for sliding windows, ALiBi and the like. Rather than keep a list of
architectures, each loaded backbone is compared with its own full forward, and refused if they differ. Both sides get a
real prompt: an architecture may agree on random ids but differ on text, or differ without its BOS token.

`prove` compares again what a bundle will be served with: compiled or in fp8, with its own projections and vectors.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from models.backbone import Backbone, BackboneError
from models.packed import PackedModel, Part, Row
from models.packs import Branch, Floats, Pack, ScoringGroup
from models.projected import SlotVectors
from models.prompt_tree import TreeModel, lay_out
from models.scorer import logit
from models.scoring_model import ScoringModel
from models.segments import Segment, SlotKind

if TYPE_CHECKING:  # the template's configuration needs pydantic, scoring alone does not
    from models.template import Template

HISTORY_TOKENS = 96
TITLES = ("The Copper Lighthouse (1987)", "Nine Letters from Étretat (2003)", "Up (2009)", "A Winter's Debt, Part 2")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
COMPARED = 4  # candidates of a proof that the reference scores too, a forward each
LARGE = 8.0  # a logit above this is compared relative to its size
FP8_TOLERANCE = 2.0  # twice what fp8 changes of random weights; `sella-train precision` measures it on data
LEAST_SPREAD = 0.1  # of the reference's spread among the candidates: less, and the path does not tell them apart


@torch.no_grad()
def probe(backbone: Backbone, template: "Template", history_tokens: int = HISTORY_TOKENS) -> float:
    """Compare packed two-row logits with the model's own forward on a prompt whose history has `history_tokens`.

    The model's own forward begins with the tokens that the tokenizer puts before a text.

    Returns:
        the largest difference, in logits.

    Raises:
        BackboneError: they differ beyond rounding, or the longest prompt does not fit into the architecture's window.
    """
    kind = type(backbone.causal_lm).__name__
    check_window(backbone, template)
    pack = _pack(template, history_tokens)
    try:
        tree = TreeModel(backbone).logits(lay_out([pack, pack]).to(backbone.device)).tolist()
        packed = _packed_logits(backbone, pack)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise BackboneError(
            f"{kind}: it does not take embeddings with positions and an attention function: {error}"
        ) from error
    lead = tuple(backbone.tokenizer("A").input_ids[: -len(backbone.encoder.encode("A"))])
    text = pack.trunk.token_ids[len(backbone.encoder.lead) :]
    worst = 0.0
    for branch, *ours in zip(pack.branches * 2, tree, packed * 2, strict=True):
        kept = branch.attach - len(backbone.encoder.lead)
        prompt = lead + text[:kept] + branch.segment.token_ids
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


@torch.no_grad()
def prove(model: ScoringModel, group: ScoringGroup, vectors: SlotVectors, max_tokens: int) -> float:
    """Score a real prompt on the path that will serve, and some of its candidates by `models.scorer`.

    Returns:
        the largest difference, in logits.

    Raises:
        NotFiniteError: a logit is not finite.
        BackboneError: the two differ beyond rounding.
    """
    [ours_K] = model.logits([group], max_tokens, [vectors])
    chosen = np.unique(np.linspace(0, len(ours_K) - 1, COMPARED).astype(int)).tolist()
    theirs = np.array([_reference(model, group, vectors, one) for one in chosen])
    return check_logits(ours_K[chosen], theirs, model.backbone.dtype, fp8=model.fp8)


def check_logits(ours_K: Floats, theirs_K: NDArray[np.floating], dtype: torch.dtype, *, fp8: bool = False) -> float:
    """Return the largest difference of logits from the reference's.

    Raises:
        BackboneError: they differ beyond rounding.
    """
    tolerance = FP8_TOLERANCE if fp8 else TOLERANCE[dtype]
    allowed = tolerance * max(1.0, float(np.abs(theirs_K).max()) / LARGE)
    worst = float(np.abs(ours_K - theirs_K).max())
    remedy = "where SELLA_COMPILED or SELLA_DTYPE is set, unset it"
    if not worst <= allowed:
        raise BackboneError(
            f"its logits differ by {worst:.3g} from the reference's, and rounding explains {allowed:.3g}; {remedy}"
        )
    ours, theirs = float(np.ptp(ours_K)), float(np.ptp(theirs_K))
    if theirs > TOLERANCE[torch.float32] and ours < LEAST_SPREAD * theirs:
        raise BackboneError(f"its logits are within {ours:.3g}, and the reference's within {theirs:.3g}; {remedy}")
    return worst


def _reference(model: ScoringModel, group: ScoringGroup, vectors: SlotVectors, candidate: int) -> float:
    """Return a candidate's logit by the reference."""
    slots = {
        SlotKind.USER: torch.from_numpy(group.user_1C[0]),
        SlotKind.ITEM: torch.from_numpy(group.item_KC[candidate]),
        SlotKind.WARM: torch.from_numpy(group.semantic_KD[candidate]),
    }
    prompt = group.pack.trunk + group.pack.branches[candidate].segment
    return logit(model.backbone, prompt, vectors.projections, slots)


def check_window(backbone: Backbone, template: "Template") -> None:
    """Refuse an architecture whose window is shorter than the longest prompt.

    Raises:
        BackboneError: the longest prompt does not fit; the message names the setting that makes it fit.
    """
    config = backbone.causal_lm.config.get_text_config()
    longest, kind = longest_prompt(template), type(backbone.causal_lm).__name__
    for name in ("max_position_embeddings", "sliding_window"):
        window = getattr(config, name, None)
        if window is None or longest <= window:
            continue
        history = longest_history(template) - (longest - window)
        title = template.config.title_tokens + history
        remedy = "choose another backbone"
        if history >= 0:
            remedy = f"set template.history_tokens to {history} or less, or {remedy}"
        elif title >= 1:
            remedy = f"set template.history_tokens to 0 and template.title_tokens to {title} or less, or {remedy}"
        raise BackboneError(f"{kind}: its {name} is {window} and the longest prompt takes {longest} tokens; {remedy}")


def longest_prompt(template: "Template") -> int:
    """Return the number of tokens of the longest prompt that the template's caps allow."""
    from models.template import PromptKind, Title

    title = Title((0,) * template.config.title_tokens)
    return longest_history(template) + max(
        len(template.instruction(kind))
        + max(len(template.user_tail(kind, empty_history=empty)) for empty in (False, True))
        + len(template.candidate(kind, title))
        for kind in PromptKind
    )


def longest_history(template: "Template") -> int:
    """Return the number of tokens of the longest history that the template's caps allow."""
    from models.template import Title

    line = template.history_item(Title((0,) * template.config.title_tokens))
    return min(template.config.history_tokens, template.config.max_history * len(line))


def _packed_logits(backbone: Backbone, pack: Pack) -> list[float]:
    """Return what `models.packed` makes of each branch, the trunk cut where the branch attaches."""
    parts = [Part(Segment(pack.trunk.token_ids[: one.attach]), (one.segment,)) for one in pack.branches]
    row = Row.of(parts, backbone.device)
    hidden_KD = PackedModel(backbone).hidden(row, backbone.embed(row.token_ids_T))
    logits: list[float] = backbone.answer_logits(hidden_KD).tolist()
    return logits


def _pack(template: "Template", history_tokens: int) -> Pack:
    """Return stage 1's prompt for two candidates, and for a third candidate after half of the history."""
    from models.template import PromptKind

    kind = PromptKind.ADAPT
    titles = template.titles(TITLES)
    history: list[Segment] = []
    while sum(map(len, history)) < history_tokens:
        history.append(template.history_item(titles[len(history) % len(titles)]))
    trunk = template.instruction(kind)
    half = len(trunk)
    for place, line in enumerate(history):
        trunk = trunk + line
        half = len(trunk) if place < len(history) // 2 else half
    attached = ((len(trunk), titles[0]), (len(trunk), titles[1]), (half, titles[2]))
    return Pack(trunk, tuple(Branch(at, template.candidate(kind, title)) for at, title in attached))
