"""Packed prompts with gradients, for training.

A forward is one row without padding: the tokens that every prompt begins with (the root: an instruction), then each
pack's trunk, then every branch. A trunk token attends to the root and to its own trunk. A branch token attends to the
root, to its trunk up to the point where the branch attaches, and to its own branch. Every token therefore sees exactly
its own prompt, and no token is computed twice. Attention is three small batched products. One product under a mask over
the whole row would cost the square of the row's length.

Scoring uses `models.packed`, whose kernels are faster and give no gradients.

Shapes: T tokens of the row, N packs, K branches over all packs, R tokens of the root, P of the longest trunk behind it,
S of the longest branch, H query heads, J key/value heads, E dimensions of a head, C = d_C, D = d_L.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from models.attention import check_attention
from models.backbone import Backbone
from models.packs import Pack
from models.projection import Projections
from models.segments import SlotKind

NAME = "sella_tree"
_HIDDEN = -1e30  # added to the scores of hidden keys; minus infinity would give NaN gradients in empty rows


@dataclass(frozen=True, slots=True)
class SlotVectors:
    """The vectors for a tree's slots, before projection, in pack and branch order."""

    user_UC: Tensor
    item_KC: Tensor
    semantic_KD: Tensor


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """Runs of the row's tokens, one a line; a shorter run repeats its last token."""

    places: Tensor  # (lines, longest), in the row
    own: Tensor  # places of the tokens that are not repetitions, in the flattened rectangle

    @classmethod
    def of(cls, lengths: Sequence[int], start: int) -> "_Rectangle":
        lengths_N = torch.tensor(lengths)
        ends_N = start + lengths_N.cumsum(0)
        columns = torch.arange(int(lengths_N.max()))
        places = (ends_N - lengths_N)[:, None] + torch.minimum(columns, (lengths_N[:, None] - 1).clamp(min=0))
        return cls(places, (columns < lengths_N[:, None]).flatten().nonzero().flatten())

    def to(self, device: torch.device | str) -> "_Rectangle":
        return _Rectangle(self.places.to(device), self.own.to(device))

    def take(self, rows_TX: Tensor) -> Tensor:
        """Return the tokens' rows as (lines, longest, X)."""
        return rows_TX.index_select(0, self.places.flatten()).view(*self.places.shape, rows_TX.shape[-1])


@dataclass(frozen=True, slots=True)
class PromptTree:
    """Packs laid out as one row. Slots and answers are places in the row, in pack and branch order."""

    token_ids_T: Tensor
    position_ids_T: Tensor
    slots: dict[SlotKind, Tensor]
    answers_K: Tensor
    longest: int  # tokens of the longest prompt
    root: int
    trunks: _Rectangle
    branches: _Rectangle
    trunk_of_K: Tensor
    # Added to attention scores: 0 where a token sees a key, else `_HIDDEN`.
    root_1RR: Tensor
    trunks_1PX: Tensor  # X: root and trunk
    branches_KSX: Tensor  # X: root, trunk and branch

    def to(self, device: torch.device | str) -> "PromptTree":
        """Return the tree on a device."""
        tensors = ("token_ids_T", "position_ids_T", "answers_K", "trunk_of_K", "root_1RR", "trunks_1PX", "branches_KSX")
        return replace(
            self,
            **{name: getattr(self, name).to(device) for name in tensors},
            slots={kind: places.to(device) for kind, places in self.slots.items()},
            trunks=self.trunks.to(device),
            branches=self.branches.to(device),
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return one layer's attention, (1, T, H, E); `query` is (1, H, T, E), `key` and `value` (1, J, T, E)."""
        heads, pairs, width = query.shape[1], key.shape[1], key.shape[3]
        query_TX = (query[0] * scale).transpose(0, 1).reshape(-1, heads * width)
        both_TX = torch.cat([key[0], value[0]]).transpose(0, 1).reshape(-1, 2 * pairs * width)

        def attention(query_NSX: Tensor, both_NPX: Tensor, seen_NSP: Tensor) -> Tensor:
            lines, length, _ = query_NSX.shape
            # Query heads that share a key head become further queries of that head.
            query_NJQE = query_NSX.view(lines, length, pairs, -1, width).permute(0, 2, 3, 1, 4).flatten(2, 3)
            key_NJPE, value_NJPE = both_NPX.view(lines, -1, 2, pairs, width).permute(2, 0, 3, 1, 4)
            scores_NJGSP = (query_NJQE @ key_NJPE.transpose(-1, -2)).unflatten(2, (-1, length))
            weights = (scores_NJGSP.float() + seen_NSP[:, None, None]).softmax(-1).to(value_NJPE.dtype)
            out_NJGSE: Tensor = (weights.flatten(2, 3) @ value_NJPE).unflatten(2, (-1, length))
            return out_NJGSE.permute(0, 3, 1, 2, 4).reshape(lines * length, heads * width)

        root_RX, trunks_NXX = both_TX[: self.root], self.trunks.take(both_TX)
        trunks_NXX = torch.cat([root_RX.expand(len(trunks_NXX), -1, -1), trunks_NXX], dim=1)
        out = [attention(query_TX[None, : self.root], root_RX[None], self.root_1RR)] if self.root else []
        if self.trunks.places.shape[1]:
            attended = attention(self.trunks.take(query_TX), trunks_NXX, self.trunks_1PX)
            out.append(attended.index_select(0, self.trunks.own))
        branches_KXX = torch.cat([trunks_NXX.index_select(0, self.trunk_of_K), self.branches.take(both_TX)], dim=1)
        attended = attention(self.branches.take(query_TX), branches_KXX, self.branches_KSX)
        out.append(attended.index_select(0, self.branches.own))
        return torch.cat(out).view(1, -1, heads, width)


def lay_out(packs: Sequence[Pack]) -> PromptTree:
    """Lay packs out as one row; the tokens that all of their prompts begin with are the root."""
    root = _root(packs)
    ids = list(packs[0].trunk.token_ids[:root])
    positions = list(range(root))
    slots: dict[SlotKind, list[int]] = {kind: [] for kind in SlotKind}
    trunk_lengths: list[int] = []
    for pack in packs:
        for kind, index in pack.trunk.slots:
            slots[kind].append(len(ids) + index - root)
        ids.extend(pack.trunk.token_ids[root:])
        positions.extend(range(root, len(pack.trunk)))
        trunk_lengths.append(len(pack.trunk) - root)
    trunk_tokens = len(ids)
    owners: list[int] = []
    for number, pack in enumerate(packs):
        for branch in pack.branches:
            for kind, index in branch.segment.slots:
                slots[kind].append(len(ids) + index)
            ids.extend(branch.segment.token_ids)
            positions.extend(range(branch.attach, branch.attach + len(branch.segment)))
            owners.append(number)
    branches = [branch for pack in packs for branch in pack.branches]
    lengths = [len(branch.segment) for branch in branches]
    attach_K = torch.tensor([branch.attach for branch in branches])
    width, longest = max(trunk_lengths), max(lengths)
    before_KX = torch.arange(root + width) < attach_K[:, None]
    own_KSS = _causal(longest).expand(len(branches), -1, -1)
    return PromptTree(
        token_ids_T=torch.tensor(ids),
        position_ids_T=torch.tensor(positions),
        slots={kind: torch.tensor(places, dtype=torch.long) for kind, places in slots.items()},
        answers_K=trunk_tokens + torch.tensor(lengths).cumsum(0) - 1,
        longest=max(positions) + 1,
        root=root,
        trunks=_Rectangle.of(trunk_lengths, root),
        branches=_Rectangle.of(lengths, trunk_tokens),
        trunk_of_K=torch.tensor(owners),
        root_1RR=_seen(_causal(root)[None]),
        trunks_1PX=_seen(torch.cat([torch.ones(width, root, dtype=torch.bool), _causal(width)], dim=1)[None]),
        branches_KSX=_seen(torch.cat([before_KX[:, None].expand(-1, longest, -1), own_KSS], dim=2)),
    )


def _root(packs: Sequence[Pack]) -> int:
    """Return how many tokens all prompts begin with, before any slot and any point where a branch attaches.

    A single pack has no root: all of it is trunk.
    """
    if len(packs) == 1:
        return 0
    same = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*(one.trunk.token_ids for one in packs))))  # noqa: B905
    slots = (index for pack in packs for _, index in pack.trunk.slots)
    return min(same, *slots, *(branch.attach for pack in packs for branch in pack.branches))


def _causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril_()


def _seen(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill_(~seen, _HIDDEN)


class TreeModel:
    """A backbone's language model with tree attention. It shares the weights of the backbone and of its adapter."""

    def __init__(self, backbone: Backbone) -> None:
        """Make the model.

        Raises:
            BackboneError: the architecture does not take attention functions of transformers' interface.
        """
        self.backbone = backbone
        self.decoder: Any = backbone.twin(NAME).base_model

    def logits(
        self, tree: PromptTree, projections: Projections | None = None, vectors: SlotVectors | None = None
    ) -> Tensor:
        """Return `log p(Yes) - log p(No)` of every branch (Eqs. 1-3 and 10), fp32, shape (K,)."""
        embeds_TD = splice(self.backbone.embed(tree.token_ids_T), tree, projections, vectors)
        out = self.decoder(
            inputs_embeds=embeds_TD[None], position_ids=tree.position_ids_T[None], use_cache=False, packed=tree
        )
        return self.backbone.answer_logits(out.last_hidden_state[0].index_select(0, tree.answers_K))


def splice(embeds_TD: Tensor, tree: PromptTree, projections: Projections | None, vectors: SlotVectors | None) -> Tensor:
    """Put the projected vectors in place of the slots' embeddings (Eq. 10). Gradients reach the vectors.

    Raises:
        ValueError: slots without vectors, or counts that differ.
    """
    needed = {kind: len(where) for kind, where in tree.slots.items() if len(where)}
    if not needed:
        return embeds_TD
    if projections is None or vectors is None:
        raise ValueError(f"the prompt has slots {sorted(needed)} but no vectors were given")
    raw = {SlotKind.USER: vectors.user_UC, SlotKind.ITEM: vectors.item_KC, SlotKind.WARM: vectors.semantic_KD}
    for kind, where in tree.slots.items():
        if len(where) != len(raw[kind]):
            raise ValueError(f"{kind}: {len(where)} slots but {len(raw[kind])} vectors")
        if len(where):
            project = projections.warm if kind is SlotKind.WARM else projections.collab
            embeds_TD = embeds_TD.index_put((where,), project(raw[kind]).to(embeds_TD.dtype))
    return embeds_TD


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    packed: PromptTree,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within the tree: an attention function of transformers' interface. It ignores the mask.

    Raises:
        ValueError: the architecture asks for more than softmax attention over the whole prompt.
    """
    check_attention(module, packed.longest, options)
    return packed.attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None


AttentionInterface.register(NAME, tree_attention)
