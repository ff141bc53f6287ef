import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.projected import ProjectedRows

VECTORS = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)


class Counted(nn.Module):
    """A linear layer that counts the rows it projects."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4).requires_grad_(False)
        self.rows = 0

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        self.rows += len(vectors)
        out: torch.Tensor = self.linear(vectors)
        return out


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 29), min_size=1, max_size=12), max_size=12), st.sampled_from([1, 5, 12, 100]))
def test_rows_are_their_own_projections_whatever_was_evicted(asked: list[list[int]], fit: int) -> None:
    projection = Counted()
    rows = ProjectedRows(projection, 4, torch.empty(0), budget_bytes=fit * 16)
    for wanted in asked:
        torch.testing.assert_close(rows(VECTORS[wanted]), projection.linear(torch.from_numpy(VECTORS[wanted])))
        assert len(rows._rows) <= fit


def test_a_vector_is_projected_once() -> None:
    projection = Counted()
    rows = ProjectedRows(projection, 4, torch.empty(0), budget_bytes=10**4)
    rows(VECTORS[[1, 2, 1]])
    rows(VECTORS[[2, 3, 1]])
    assert projection.rows == 3


def test_rows_come_in_the_type_asked_for() -> None:
    rows = ProjectedRows(Counted(), 4, torch.empty(0, dtype=torch.bfloat16), budget_bytes=10**4)
    assert rows(VECTORS[:3]).dtype == torch.bfloat16
