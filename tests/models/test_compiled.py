import shutil

import numpy as np
import pytest

from models.scoring_model import ScoringModel
from tests.models.test_packed import BACKBONE, PROJECTIONS, group


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile takes a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_compiled_norms_and_mlps_give_the_same_scores() -> None:
    compiled, plain = ScoringModel(BACKBONE, PROJECTIONS, compiled=True), ScoringModel(BACKBONE, PROJECTIONS)
    for seed, candidates in ((1, 3), (2, 30)):
        one = group(seed, candidates, 5)
        np.testing.assert_allclose(compiled.score([one])[0], plain.score([one])[0], atol=1e-5)
