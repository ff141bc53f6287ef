"""Attention of packed prompts: a product with what is shared, a product with what is one's own, merged exactly.

All prompts of a forward lie in one row: the trunks' new tokens first, then the branches'. A branch token attends to its
whole trunk and to its own branch. The softmax over both is the two products' softmaxes weighted by their log-sum-exps,
so no mask over branches is made, and the cost grows with the number of branches, not with its square.

For inference alone: the CPU kernel's log-sum-exp carries no gradient. Training uses `models.prompt_tree`.

Shapes: T tokens of the row, R branch tokens among them, N branches, S tokens of the longest, P tokens of a trunk, A of
them new, L layers, H query heads, J key/value heads, E dimensions of a head.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from models.kernels import attend, merge

NAME = "sella_packed"
RECTANGLE = 2048  # tokens: about what the kernels of one more rectangle cost


class Attends(Protocol):
    """What a forward hands to its layers' attention."""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        ...

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return the attention of one layer, in the queries' shape; called for each layer in turn."""
        ...


@dataclass(frozen=True, slots=True)
class TrunkSpan:
    """Where a trunk's new tokens and its branches' tokens lie in the row, and what is kept of its tokens before."""

    new: slice
    branches: slice
    answers: int  # how many branches
    past_L2JPE: Tensor | None


@dataclass(frozen=True, slots=True)
class Rectangle:
    """The tokens of branches of similar length, one branch a row.

    A shorter branch repeats its last token. Causal attention hides that from the rest, and unlike a zero or a
    neighbour's token it is not NaN unless the branch itself is.
    """

    branches_N: Tensor  # which branches
    places_NS: Tensor  # in the row
    repeats_NS: Tensor  # True where a token is repeated


@dataclass(frozen=True, slots=True)
class OwnTokens:
    """The branches' tokens in rectangles: one, or several where a few long branches would pad all the others."""

    rectangles: tuple[Rectangle, ...]
    order_N: Tensor  # of each branch among the rows of all rectangles
    places_R: Tensor  # of each branch token among the places of all rectangles
    answers_N: Tensor  # each branch's last token, its place in the row

    @classmethod
    def of(cls, lengths: Sequence[int], start: int, device: torch.device) -> "OwnTokens":
        """Lay out branches of these lengths that follow each other from place `start` on."""
        lengths_N = torch.tensor(lengths)
        ends_N = start + lengths_N.cumsum(0)
        first_N = torch.empty_like(lengths_N)  # the place of each branch's first token among those of all rectangles
        rectangles, taken, shorter = [], 0, 0
        for longest in _widths(lengths):
            branches_N = ((lengths_N > shorter) & (lengths_N <= longest)).nonzero().flatten()
            own_N = lengths_N[branches_N, None]
            columns_S = torch.arange(longest)
            places_NS = ends_N[branches_N, None] - own_N + torch.minimum(columns_S, own_N - 1)
            first_N[branches_N] = taken + longest * torch.arange(len(branches_N))
            rectangles.append(Rectangle(*(one.to(device) for one in (branches_N, places_NS, columns_S >= own_N))))
            taken, shorter = taken + places_NS.numel(), longest
        order_N = torch.cat([one.branches_N for one in rectangles]).argsort()
        begins_N = ends_N - lengths_N - start
        places_R = torch.arange(int(lengths_N.sum())) + (first_N - begins_N).repeat_interleave(lengths_N)
        return cls(tuple(rectangles), order_N, places_R.to(device), (ends_N - 1).to(device))


def _widths(lengths: Sequence[int]) -> list[int]:
    """Return the widths of the rectangles, ascending, that make tokens and repeats together the fewest.

    A further rectangle counts as `RECTANGLE` tokens.
    """
    counted = sorted(Counter(lengths).items())
    longest = counted[-1][0]
    if longest * len(lengths) - sum(lengths) <= RECTANGLE:
        return [longest]
    best: list[tuple[int, list[int]]] = [(0, [])]  # of the shortest lengths: the cost, and the widths
    for end in range(1, len(counted) + 1):
        branches, options = 0, []
        for begin in range(end - 1, -1, -1):
            branches += counted[begin][1]
            options.append((best[begin][0] + RECTANGLE + branches * counted[end - 1][0], begin))
        cost, begin = min(options)
        best.append((cost, [*best[begin][1], counted[end - 1][0]]))
    return best[-1][1]


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Who attends to whom in one forward; the trunks' new keys and values are kept here as the layers compute them."""

    spans: tuple[TrunkSpan, ...]
    trunk_tokens: int  # new tokens of all trunks; branch tokens begin here
    own: OwnTokens
    longest: int
    kept_L: list[list[Tensor]] = field(default_factory=list)  # one (2, J, A, E) for each span

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return the attention of one layer, (1, H, T, E); called for each layer in turn."""
        out = torch.empty_like(query)
        own, own_lse = self._attend_own(query, key, value, scale)
        for span, trunk in zip(self.spans, self.keep(key, value), strict=True):
            out[:, :, span.new] = _attend_new(query[:, :, span.new], trunk, scale)
            mine = slice(span.branches.start - self.trunk_tokens, span.branches.stop - self.trunk_tokens)
            out[:, :, span.branches] = add_shared(
                own[:, :, mine], own_lse[:, :, mine], query[:, :, span.branches], trunk, scale
            )
        return out

    def keep(self, key: Tensor, value: Tensor) -> list[Tensor]:
        """Keep a layer's new keys and values of every trunk; return each trunk's all, (2, J, P, E)."""
        layer = len(self.kept_L)
        new = [torch.stack((key[0, :, span.new], value[0, :, span.new])) for span in self.spans]
        self.kept_L.append(new)
        return [
            one if span.past_L2JPE is None else torch.cat((span.past_L2JPE[layer], one), dim=2)
            for span, one in zip(self.spans, new, strict=True)
        ]

    def _attend_own(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Let every branch attend to itself, causally."""
        outs, lses = [], []
        for rectangle in self.own.rectangles:
            query_NHSE, key_NJSE, value_NJSE = (
                one[0, :, rectangle.places_NS].transpose(0, 1) for one in (query, key, value)
            )
            out_NHSE, lse_NHS = attend(query_NHSE, key_NJSE, value_NJSE, scale=scale, causal=True)
            outs.append(out_NHSE.transpose(0, 1).flatten(1, 2))
            lses.append(lse_NHS.transpose(0, 1).flatten(1, 2))
        places_R = self.own.places_R
        return torch.cat(outs, 1)[None, :, places_R], torch.cat(lses, 1)[None, :, places_R]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    packed: Attends,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as `packed` says: an attention function of transformers' interface.

    `query` is (1, H, T, E), `key` and `value` (1, J, T, E); returns (1, T, H, E). The mask plays no part.

    Raises:
        ValueError: the architecture asks for more than softmax attention over the whole prompt.
        RuntimeError: gradients are wanted.
    """
    check_attention(module, packed.longest, options)
    if torch.is_grad_enabled() and query.requires_grad:
        raise RuntimeError("packed attention gives no gradients; train with models.prompt_tree")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packed.attend(query, key, value, scale).transpose(1, 2), None


AttentionInterface.register(NAME, packed_attention)


def check_attention(module: nn.Module, longest: int, options: Mapping[str, Any]) -> None:
    """Raise ValueError if an architecture needs more than softmax attention over the whole prompt."""
    asked = sorted(name for name in ("softcap", "s_aux") if options.get(name) is not None)
    if asked:
        raise ValueError(f"{type(module).__name__} attends with {asked}, which packed prompts do not have")
    window = options.get("sliding_window")
    if window is not None and longest > window:
        raise ValueError(f"a prompt of {longest} tokens exceeds the attention window of {window}")


def add_shared(own: Tensor, own_lse: Tensor, query: Tensor, shared: Tensor, scale: float) -> Tensor:
    """Return attention over one's own tokens, known already, and over shared keys and values, (2, J, P, E)."""
    if not shared.shape[2]:
        return own
    return merge(own, own_lse, *attend(query, shared[:1], shared[1:], scale=scale))


def _attend_new(query: Tensor, trunk: Tensor, scale: float) -> Tensor:
    """Let a trunk's new tokens, its last, attend to each other, causally, and to all that came before them."""
    count, known = query.shape[2], trunk.shape[2] - query.shape[2]
    if not count:
        return query
    new = trunk[:, :, known:]
    out, lse = attend(query, new[:1], new[1:], scale=scale, causal=True)
    return add_shared(out, lse, query, trunk[:, :, :known], scale)
