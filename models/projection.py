"""The two projections into the language model's embedding space (Eq. 7 and section 4.3).

Shapes: B rows, C = d_C collab dimensions, D = d_L of the language model.
"""

import torch
from torch import Tensor, nn

BIAS_SPREAD = 4.5  # docs/results.md: 9 reaches less in as many steps


class CollabProjection(nn.Module):
    """`W2 GELU(W1 e + b1) + b2` (Eq. 7), shared by `<User_ID>` and `<Item_ID>`."""

    def __init__(self, d_collab: int, d_hidden: int, d_model: int) -> None:
        super().__init__()
        self.inner = nn.Linear(d_collab, d_hidden)
        self.outer = nn.Linear(d_hidden, d_model)
        self.register_buffer("center_C", torch.zeros(d_collab))
        self.register_buffer("spread_C", torch.ones(d_collab))

    center_C: Tensor
    spread_C: Tensor

    def forward(self, vectors_BC: Tensor) -> Tensor:
        """Return `(B, D)` in the parameters' dtype."""
        standard_BC = (vectors_BC - self.center_C) / self.spread_C
        out: Tensor = self.outer(nn.functional.gelu(self.inner(standard_BC)))
        return out

    @torch.no_grad()
    def standardize(self, users_UC: Tensor, items_IC: Tensor) -> None:
        """Measure inputs from their center in units of their spread, without changing what is computed.

        Collab vectors vary by a tenth around constant dimensions; a gradient step on W1 would move the constants and
        hardly the differences. The factors share one spread. Each bias, constant in the other kind, has its own and
        then varies by `BIAS_SPREAD` of them: what matters most is learned first, and b_u as fast as b_i, which as it is
        varies almost twice as much. W1 and b1 take up the change, so Eq. 7 holds with other numbers.
        """
        center = (users_UC.mean(0) + items_IC.mean(0)) / 2
        # Within each kind: the difference between the two kinds is no spread.
        users, items = users_UC.var(0, correction=0), items_IC.var(0, correction=0)
        factors = ((users + items) / 2).mean().sqrt()
        biases = torch.maximum(users, items).sqrt() / BIAS_SPREAD
        spread = torch.where(torch.minimum(users, items) == 0, biases, factors).clamp_min(1e-6)
        weight = self.inner.weight / self.spread_C  # of the raw vectors
        bias = self.inner.bias - weight @ self.center_C
        self.inner.weight.copy_(weight * spread)
        self.inner.bias.copy_(bias + weight @ center)
        self.center_C.copy_(center)
        self.spread_C.copy_(spread)

    @torch.no_grad()
    def start_at(self, vectors_BC: Tensor, neutral_D: Tensor, distance: float) -> None:
        """Shift and scale the outputs: `vectors_BC` project to the mean `neutral_D` and to a mean distance from it.

        The InfoNCE of stage 2 sees cosines alone and leaves both open. W2 and b2 take up the change, so no further
        number has to travel with the weights.
        """
        _start_at(self.outer, self(vectors_BC), neutral_D, distance)


class WarmProjection(nn.Module):
    """The linear layer d_L -> d_L behind `<Warm_ID>` (section 4.3)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)

    def forward(self, semantic_BD: Tensor) -> Tensor:
        """Return `(B, D)` in the parameters' dtype."""
        out: Tensor = self.linear(semantic_BD)
        return out

    @torch.no_grad()
    def start_at(self, semantic_BD: Tensor, neutral_D: Tensor, distance: float) -> None:
        """Shift and scale the outputs like `CollabProjection.start_at`."""
        _start_at(self.linear, self(semantic_BD), neutral_D, distance)


def _start_at(last: nn.Linear, outputs_BD: Tensor, neutral_D: Tensor, distance: float) -> None:
    mean_D = outputs_BD.mean(0)
    factor = distance / (outputs_BD - mean_D).norm(dim=-1).mean().clamp_min(1e-12)
    last.weight.mul_(factor)
    last.bias.copy_((last.bias - mean_D) * factor + neutral_D)


class Projections(nn.Module):
    """Both projections, as stage 3 trains them and the bundle keeps them."""

    def __init__(self, d_collab: int, d_hidden: int, d_model: int) -> None:
        super().__init__()
        self.collab = CollabProjection(d_collab, d_hidden, d_model)
        self.warm = WarmProjection(d_model)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """d_collab, d_hidden, d_model."""
        return self.collab.inner.in_features, self.collab.inner.out_features, self.collab.outer.out_features


class Verbatim(Projections):
    """No projection: the vectors given are embeddings already."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.add_module("collab", nn.Identity())
        self.add_module("warm", nn.Identity())
