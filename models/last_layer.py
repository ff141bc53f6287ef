"""The last decoder layer, which every token enters and the answers alone leave.

A score reads the last hidden states of the answers. Of every other token the last layer owes no more than its keys and
values; queries, output projection and MLP would be thrown away. That is a layer's work less, 1 in 24 for Qwen2-0.5B.

Shapes: T tokens of the row, N branches (an answer each), S tokens of the longest, P tokens of a trunk, H query heads, J
key/value heads, E dimensions of a head, D = d_L.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import PackedLayout, add_shared


class KeysKeptError(Exception):
    """Leaves a layer once its keys and values are known: what follows would be thrown away."""


@dataclass(slots=True)
class KeysOnly:
    """Takes a layer's keys and values, and computes nothing."""

    longest: int
    key: Tensor | None = None
    value: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Keep the keys and values.

        Raises:
            KeysKeptError: always.
        """
        self.key, self.value = key, value
        raise KeysKeptError


@dataclass(frozen=True, slots=True)
class AnswersOnly:
    """Who the answers attend to: the keys and values of all tokens, taken before."""

    packed: PackedLayout
    key: Tensor
    value: Tensor

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return self.packed.longest

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return the attention of the answers' queries, (1, H, N, E); the answers' own keys are among those taken."""
        out = torch.empty_like(query)
        own, own_lse = self._attend_own(query, scale)
        start = 0
        for span, trunk in zip(self.packed.spans, self.packed.keep(self.key, self.value), strict=True):
            answers = slice(start, start := start + span.answers)
            out[:, :, answers] = add_shared(
                own[:, :, answers], own_lse[:, :, answers], query[:, :, answers], trunk, scale
            )
        return out

    def _attend_own(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Let every answer attend to its own branch, in fp32; one query a branch needs no kernel."""
        own, heads, outs, lses = self.packed.own, self.key.shape[1], [], []
        queries_NJGE = query[0].transpose(0, 1).unflatten(1, (heads, -1)).float() * scale
        for one in own.rectangles:
            key_NJSE, value_NJSE = (
                each[0, :, one.places_NS].transpose(0, 1).float() for each in (self.key, self.value)
            )
            scores_NJGS = queries_NJGE[one.branches_N] @ key_NJSE.transpose(-1, -2)
            scores_NJGS = scores_NJGS.masked_fill(one.repeats_NS[:, None, None], -torch.inf)
            outs.append((scores_NJGS.softmax(-1) @ value_NJSE).flatten(1, 2))
            lses.append(scores_NJGS.logsumexp(-1).flatten(1, 2))
        out_NHE, lse_NH = torch.cat(outs)[own.order_N], torch.cat(lses)[own.order_N]
        return out_NHE.transpose(0, 1)[None].to(query.dtype), lse_NH.T[None]


class LastLayer(nn.Module):
    """Wraps the last decoder layer of an architecture that hands its layers `position_embeddings`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, hidden_1TD: Tensor, *args: Any, packed: PackedLayout, position_embeddings: tuple[Tensor, ...], **rest: Any
    ) -> Any:
        """Return the layer's output for the answers, (1, N, D)."""
        keys = KeysOnly(packed.longest)
        with suppress(KeysKeptError):
            self.layer(hidden_1TD, *args, packed=keys, position_embeddings=position_embeddings, **rest)
        assert keys.key is not None and keys.value is not None, "every decoder layer attends"
        answers_N = packed.own.answers_N
        return self.layer(
            hidden_1TD[:, answers_N],
            *args,
            packed=AnswersOnly(packed, keys.key, keys.value),
            position_embeddings=tuple(one[:, answers_N] for one in position_embeddings),
            **rest,
        )
