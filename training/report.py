"""Compares the stages on the validation split, with paired intervals; writes the verdict in sentences."""

from typing import Any

import numpy as np

from training.examples import Examples
from training.metrics import paired_difference
from training.prediction import figures
from training.run import Run, read_tensors
from training.stages.align import Collab
from training.stages.project import Projected, collab_predictions


def stage_report(run: Run, examples: Examples, collab: Collab, result: Projected) -> dict[str, Any]:
    """Return the AUC and UAUC of every stage, and the paired difference between stage 3 and each other stage.

    All are measured on the rows of valid that choose checkpoints. Scoring the other rows twice more would take as long
    as the training on a CPU.
    """
    valid = examples.targets("valid", run.config.max_targets).limited(run.config.validation_rows)
    judged = np.concatenate(valid.groups)
    logits = {
        "stage 1, text alone": read_tensors(run.folder / "adapt_valid.safetensors")[0]["logits"].numpy(),
        "matrix factorisation": read_tensors(run.folder / "align_result.safetensors")[0]["valid_mf"].numpy(),
        "stage 2": collab_predictions(examples, collab, valid),
        "stage 3": result.valid_logits_B,
    }
    report: dict[str, Any] = {
        "stage rows": len(judged),
        "stages": {name: figures(values, valid) for name, values in logits.items()},
        "stage 3 minus": {},
    }
    for name in list(logits)[:-1]:
        ours, theirs = logits["stage 3"][judged], logits[name][judged]
        difference = paired_difference(ours, theirs, valid.label_B[judged], valid.user_B[judged])
        report["stage 3 minus"][name] = {metric: interval.as_dict() for metric, interval in difference.items()}
    return report


def verdict_sentences(report: dict[str, Any], split: str) -> list[str]:
    """Return a sentence for every scorer and metric where the interval of `score` minus the scorer is below zero."""
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
