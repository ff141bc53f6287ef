"""Matrix factorisation (Eq. 6), with the biases inside the vectors.

Shapes: B pairs, U users, I items, C = d_C.
"""

import torch
from torch import Tensor, nn


class MatrixFactorization(nn.Module):
    """User vector [p, b_u, 1], item vector [q, 1, b_i]; the prediction is their inner product.

    The paper's MF has no biases; on ML-1M they are most of what it can know. Inside the vectors they keep the
    prediction an inner product and reach the language model through the slots. The global mean starts inside b_i.
    """

    def __init__(self, n_users: int, n_items: int, d_collab: int, *, mean: float = 0.0, std: float = 0.01) -> None:
        super().__init__()
        if d_collab < 3:
            raise ValueError(f"d_collab is {d_collab}; two dimensions hold the biases, so give at least 3")
        self.user_factors = nn.Parameter(torch.randn(n_users, d_collab - 2) * std)
        self.item_factors = nn.Parameter(torch.randn(n_items, d_collab - 2) * std)
        self.user_bias = nn.Parameter(torch.zeros(n_users))
        self.item_bias = nn.Parameter(torch.zeros(n_items))
        self.mean = nn.Parameter(torch.tensor(mean))

    def user_vectors(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return [p, b_u, 1] of the given users, `(B, C)`."""
        bias = self.user_bias[rows, None]
        return torch.cat([self.user_factors[rows], bias, torch.ones_like(bias)], dim=-1)

    def item_vectors(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return [q, 1, b_i + mean] of the given items, `(B, C)`."""
        bias = self.item_bias[rows, None] + self.mean
        return torch.cat([self.item_factors[rows], torch.ones_like(bias), bias], dim=-1)

    def forward(self, users_B: Tensor, items_B: Tensor) -> Tensor:
        """Return the predicted label of each pair, `(B,)`."""
        return (self.user_vectors(users_B) * self.item_vectors(items_B)).sum(-1)
