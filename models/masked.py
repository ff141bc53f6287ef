"""Packed prompts under a dense mask: the way that training takes, because gradients pass through it.

Each pack is a row, laid out as its trunk and then its branches; a boolean mask says who attends to whom. The mask grows
with the square of a row, so scoring takes `models.packed` instead, whose kernels give no gradients.

Shapes: B packs, T tokens of the longest pack, K branches over all packs, C = d_C, D = d_L.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.backbone import Backbone
from models.packs import Pack
from models.projection import Projections
from models.segments import SlotKind


@dataclass(frozen=True, slots=True)
class MaskedBatch:
    """Packs laid out as tensors. Slots and answers are (row, column) pairs, in pack and branch order."""

    token_ids_BT: Tensor
    position_ids_BT: Tensor
    attention_B1TT: Tensor  # True where a token (third axis) attends to another (fourth)
    slots: dict[SlotKind, Tensor]  # kind -> (number of slots, 2)
    answers_K2: Tensor

    def to(self, device: torch.device | str) -> "MaskedBatch":
        """Return the batch on a device."""
        return MaskedBatch(
            self.token_ids_BT.to(device),
            self.position_ids_BT.to(device),
            self.attention_B1TT.to(device),
            {kind: where.to(device) for kind, where in self.slots.items()},
            self.answers_K2.to(device),
        )


@dataclass(frozen=True, slots=True)
class SlotVectors:
    """The vectors behind a batch's slots, before projection, in the batch's slot order."""

    user_UC: Tensor
    item_KC: Tensor
    semantic_KD: Tensor


def lay_out(packs: Sequence[Pack]) -> MaskedBatch:
    """Lay packs out side by side, padded on the right to the longest.

    Padding attends to itself alone, so that no row of the softmax is empty, and nothing attends to padding.
    """
    width = max(pack.tokens for pack in packs)
    token_ids = torch.zeros(len(packs), width, dtype=torch.long)
    positions = torch.zeros(len(packs), width, dtype=torch.long)
    attention = torch.eye(width, dtype=torch.bool).repeat(len(packs), 1, 1)
    slots: dict[SlotKind, list[tuple[int, int]]] = {kind: [] for kind in SlotKind}
    answers: list[tuple[int, int]] = []
    for row, pack in enumerate(packs):
        end = len(pack.trunk)
        token_ids[row, :end] = torch.tensor(pack.trunk.token_ids, dtype=torch.long)
        positions[row, :end] = torch.arange(end)
        attention[row, :end, :end] = torch.ones(end, end).tril_().bool()
        for kind, index in pack.trunk.slots:
            slots[kind].append((row, index))
        for branch in pack.branches:
            start, end = end, end + len(branch.segment)
            own = end - start
            token_ids[row, start:end] = torch.tensor(branch.segment.token_ids, dtype=torch.long)
            positions[row, start:end] = torch.arange(branch.attach, branch.attach + own)
            attention[row, start:end, : branch.attach] = True
            attention[row, start:end, start:end] = torch.ones(own, own).tril_().bool()
            for kind, index in branch.segment.slots:
                slots[kind].append((row, start + index))
            answers.append((row, end - 1))
    where = {kind: torch.tensor(pairs, dtype=torch.long).reshape(-1, 2) for kind, pairs in slots.items()}
    return MaskedBatch(token_ids, positions, attention[:, None], where, torch.tensor(answers, dtype=torch.long))


def splice(
    embeds_BTD: Tensor, batch: MaskedBatch, projections: Projections | None, vectors: SlotVectors | None
) -> Tensor:
    """Put the projected vectors in place of the slots' embeddings (Eq. 10). Gradients reach the vectors.

    Raises:
        ValueError: slots without vectors, or counts that differ.
    """
    needed = {kind: len(where) for kind, where in batch.slots.items() if len(where)}
    if not needed:
        return embeds_BTD
    if projections is None or vectors is None:
        raise ValueError(f"the prompt has slots {sorted(needed)} but no vectors were given")
    raw = {SlotKind.USER: vectors.user_UC, SlotKind.ITEM: vectors.item_KC, SlotKind.WARM: vectors.semantic_KD}
    for kind, where in batch.slots.items():
        if len(where) != len(raw[kind]):
            raise ValueError(f"{kind}: {len(where)} slots but {len(raw[kind])} vectors")
        if len(where):
            project = projections.warm if kind is SlotKind.WARM else projections.collab
            projected = project(raw[kind]).to(embeds_BTD.dtype)
            embeds_BTD = embeds_BTD.index_put((where[:, 0], where[:, 1]), projected)
    return embeds_BTD


def masked_logits(
    backbone: Backbone,
    batch: MaskedBatch,
    projections: Projections | None = None,
    vectors: SlotVectors | None = None,
) -> Tensor:
    """Return `log p(Yes) - log p(No)` of every branch (Eqs. 1-3 and 10), fp32, shape (K,)."""
    embeds_BTD = splice(backbone.embed(batch.token_ids_BT), batch, projections, vectors)
    hidden_BTD = backbone.hidden(embeds_BTD, batch.position_ids_BT, batch.attention_B1TT)
    return backbone.answer_logits(hidden_BTD[batch.answers_K2[:, 0], batch.answers_K2[:, 1]])
