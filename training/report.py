"""What each stage reached on the validation split, side by side, with paired intervals."""

from typing import Any

import numpy as np

from training.examples import Examples
from training.metrics import paired_difference
from training.prediction import figures
from training.run import Run, read_tensors
from training.stages.align import Collab
from training.stages.project import Projected


def stage_report(run: Run, examples: Examples, collab: Collab, result: Projected) -> dict[str, Any]:
    """Return every stage's AUC and UAUC on valid, and stage 3's paired difference to stage 1 and to MF alone."""
    valid = examples.targets("valid", run.config.max_targets)
    logits = {
        "stage 1, text alone": read_tensors(run.folder / "adapt_valid.safetensors")[0]["logits"].numpy(),
        "stage 2, MF alone": matrix_factorization_scores(examples, collab, "valid"),
        "stage 3": result.valid_logits_B,
    }
    report: dict[str, Any] = {
        "stages": {name: figures(values, valid) for name, values in logits.items()},
        "stage 3 minus": {},
    }
    for name in list(logits)[:2]:
        difference = paired_difference(logits["stage 3"], logits[name], valid.label_B, valid.user_B)
        report["stage 3 minus"][name] = {metric: interval.as_dict() for metric, interval in difference.items()}
    return report


def matrix_factorization_scores(examples: Examples, collab: Collab, split: str) -> np.ndarray:
    """Return stage 2's own predictions: trained vectors, else the prior mean and the map from text."""
    targets = examples.targets(split, 1)
    users, items = collab.user_vectors_UC.numpy(), collab.item_vectors_IC.numpy()
    scores: np.ndarray = (users[targets.user_B] * items[targets.item_B]).sum(-1).astype(np.float64)
    return scores
