"""Validation inside a stage: the logits of a split's targets under the model being trained.

Shapes: B rows of a split, K targets of a forward.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from models.packs import Pack
from models.template import PromptKind
from training.evaluate import SCORING_TOKENS
from training.examples import Examples, Int32, Targets, forwards, rows_of
from training.metrics import Floats, auc, uauc
from training.run import Run

Forward = Callable[[Sequence[tuple[Pack, Int32]]], Tensor]


@torch.no_grad()
def predict(run: Run, examples: Examples, kind: PromptKind, targets: Targets, forward: Forward) -> Floats:
    """Return the logit of every target of a split, `(B,)`; 0 for rows that are in no group. Shared by processes."""
    logits_B = torch.zeros(len(targets), dtype=torch.float64)
    packs = [(examples.pack(kind, targets, rows), rows) for rows in targets.groups]
    batches = run.share(list(forwards(packs, max(run.config.max_tokens, SCORING_TOKENS))))
    progress = run.inner_progress(f"{kind.value}, scoring {targets.split}", sum(len(rows_of(one)) for one in batches))
    for batch in batches:
        rows = rows_of(batch)
        logits_B[rows] = forward(batch).detach().double().cpu()
        progress.update(progress.done + len(rows), rows=len(rows))
    predicted: Floats = run.sum(logits_B.to(run.device)).cpu().numpy()
    return predicted


def figures(logits_B: Floats, targets: Targets) -> dict[str, float | None]:
    """Return auc, uauc and log_loss of a split's logits; None for what the labels or the logits leave undefined."""
    rows = np.concatenate(targets.groups)
    logits, labels, users = logits_B[rows], targets.label_B[rows], targets.user_B[rows]
    loss = float(np.logaddexp(0.0, np.where(labels > 0, -logits, logits)).mean())
    return {
        "auc": auc(logits, labels),
        "uauc": uauc(logits, labels, users),
        "log_loss": loss if np.isfinite(logits).all() else None,
    }


def worth(figures: Mapping[str, float | None], objective: str = "auc") -> float:
    """Return a number that is higher for better logits: the objective, or minus the log-loss where it is undefined.

    One class alone leaves the AUC undefined for every checkpoint of a stage, so the two never meet in one comparison.
    """
    value, loss = figures[objective], figures.get("log_loss")
    return value if value is not None else -np.inf if loss is None else -loss
