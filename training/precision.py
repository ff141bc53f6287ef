"""What another number type costs a bundle's scores, on data: differences with their intervals.

Shapes: B rows of a split.
"""

from pathlib import Path
from typing import Any

import numpy as np

from training.data.dataset import Dataset
from training.data.history import Histories
from training.evaluate import Scorer, score_split
from training.metrics import auc, log_loss_difference, paired_difference
from training.progress import Progress, no_progress
from training.start import open_scorer


def precision_study(
    bundle: Path,
    dataset: Dataset,
    histories: Histories,
    split: str,
    device: str,
    dtype: str,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Score a split in the bundle's own type and in `dtype`; return both and the differences.

    `worst` is the largest difference of a raw score, `auc`, `uauc` and `log_loss` are `dtype` minus the bundle's own.

    Raises:
        BundleError, BackboneError: the bundle cannot be used.
    """
    opened, own = open_scorer(bundle, device, None)
    own_B = score_split(own, dataset, histories, split, progress=lambda done, total: progress(done, 2 * total)).raw_B
    _, other = open_scorer(bundle, device, dtype)
    # The same vectors of items outside the catalogue: they are data here, not what is compared.
    other = Scorer(other.model, own.tables, own.assembler)
    other_B = score_split(
        other, dataset, histories, split, progress=lambda done, total: progress(total + done, 2 * total)
    ).raw_B
    labels_B = dataset.splits[split]["label"].to_numpy()
    users_B = histories.of_split(split).user_code
    differences = paired_difference(other_B, own_B, labels_B, users_B)
    differences["log_loss"] = log_loss_difference(other_B, own_B, labels_B, users_B)
    return {
        "split": split,
        "rows": len(labels_B),
        "own": {"dtype": opened.manifest.backbone.dtype, "auc": auc(own_B, labels_B)},
        "other": {"dtype": dtype, "auc": auc(other_B, labels_B)},
        "worst": float(np.abs(other_B - own_B).max()),
        "difference": {name: interval.as_dict() for name, interval in differences.items()},
    }
