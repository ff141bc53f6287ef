import numpy as np
import pytest
import torch
from torch import nn

from models.fp8 import Fp8Linear
from models.scoring_model import ScoringModel
from tests.models.test_packed import BACKBONE, PROJECTIONS, group


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_near_the_exact_one_whatever_the_scale(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias).to(torch.bfloat16).requires_grad_(False)
    for scale in (1e-4, 1.0, 1e4):
        x = torch.randn(3, 20, 64, dtype=torch.bfloat16) * scale
        exact, rough = linear(x), Fp8Linear(linear)(x)
        assert rough.shape == exact.shape and rough.dtype == exact.dtype
        assert float((exact - rough).norm() / exact.norm()) < 0.06


def test_one_loud_token_does_not_drown_the_others() -> None:
    linear = nn.Linear(32, 16, bias=False).requires_grad_(False).to(torch.bfloat16)
    x = torch.ones(2, 32, dtype=torch.bfloat16)
    x[0] *= 1e6
    quiet = Fp8Linear(linear)(x)[1]
    assert float((quiet - linear(x)[1]).norm() / linear(x)[1].norm()) < 0.06


def test_scores_in_fp8_stay_near_and_the_backbone_is_left_as_it_is() -> None:
    import copy

    backbone = copy.deepcopy(BACKBONE)
    backbone.model.to(torch.bfloat16)
    one = group(1, 40, 5)
    [before] = ScoringModel(backbone, PROJECTIONS).score([one])
    [rough] = ScoringModel(backbone, PROJECTIONS, fp8=True).score([one])
    [after] = ScoringModel(backbone, PROJECTIONS).score([one])
    np.testing.assert_array_equal(before, after)
    assert not np.array_equal(before, rough)
    assert np.corrcoef(before, rough)[0, 1] > 0.95
