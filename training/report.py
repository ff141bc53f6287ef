"""What each stage reached on the validation split, side by side, with paired intervals; a verdict in sentences."""

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


def verdict_sentences(report: dict[str, Any], split: str) -> list[str]:
    """Return a sentence for every scorer and metric by which `score` loses, its whole interval below zero."""
    where = f"{split} with live counts" if report["live"] else split
    losses = []
    for name, differences in report["score minus"].items():
        for metric, gap in differences.items():
            if gap["value"] is not None and gap["high"] < 0:
                losses.append(
                    f"score loses to {name} on {where} by {-gap['value']:.3f} {metric.upper()}"
                    f" ({-gap['high']:.3f} to {-gap['low']:.3f})."
                )
    return losses or [f"score loses to none of {', '.join(report['score minus'])} on {where}."]


def matrix_factorization_scores(examples: Examples, collab: Collab, split: str) -> np.ndarray:
    """Return stage 2's own predictions: trained vectors, else the prior mean and the map from text."""
    targets = examples.targets(split, 1)
    users, items = collab.user_vectors_UC.numpy(), collab.item_vectors_IC.numpy()
    scores: np.ndarray = (users[targets.user_B] * items[targets.item_B]).sum(-1).astype(np.float64)
    return scores
