"""The measurements behind docs/results.md that take more than one training: Table 6, and the history's window.

Each prints what comes out, whatever it is.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from models.loading import Bundle
from models.prompt_tree import TreeModel
from models.template import PromptKind, Template
from training.backbones import opened_before_the_run
from training.config import TINY, Config
from training.data.dataset import DataError, Dataset, require_learnable
from training.data.history import build_histories
from training.examples import Examples, Targets
from training.metrics import auc, paired_difference
from training.pipeline import Prepared, fit, prepare, run_identity
from training.run import Run, read_tensors
from training.stages.align import Collab, align
from training.stages.project import Head, SlotForward, SlotTables, folded_users, initial_projections

Variants = dict[str, list[float]]


def alignment_study(run: Run, dataset: Dataset, backbone: str, seeds: int) -> Variants:
    """Table 6: AUC on warm validation rows before stage 3 takes its first step, for each of `seeds` seeds.

    "aligned, warm projection": stage 2 with InfoNCE, and its projection; "aligned": the same tables behind a random
    projection; "neither": stage 2 without InfoNCE, and a random projection. Stage 1 is trained once.
    """
    dataset = replace(dataset, splits={name: dataset.splits[name] for name in ("train", "valid")})
    require_learnable(dataset)
    base = None if backbone == TINY else opened_before_the_run(run, backbone)
    run.claim(run_identity(run, dataset, backbone), resume=True)
    prepared = prepare(run, dataset, build_histories(dataset, run.config.ties), base)
    valid = prepared.examples.targets("valid", run.config.max_targets)
    reached: Variants = {"aligned, warm projection": [], "aligned": [], "neither": []}
    for seed in range(seeds):
        aligned = _collab(run, prepared, seed, alignment=run.config.align.alignment)
        neither = _collab(run, prepared, seed, alignment=0.0)
        for name, collab, fresh in (
            ("aligned, warm projection", aligned, False),
            ("aligned", aligned, True),
            ("neither", neither, True),
        ):
            area = _step_zero(_seeded(run, seed), prepared, collab, valid, fresh=fresh)
            reached[name].append(area)
            run.say(f"seed {seed}: {name}: {area:.4f}")
    return reached


@dataclass(frozen=True)
class WindowResult:
    """What a kind of history window costs and reaches."""

    window: str
    tokens: dict[str, tuple[float, float]]  # prompt kind -> tokens a target packed, and one prompt a target
    stages: dict[str, dict[str, float | None]]
    logits_B: np.ndarray


def window_study(run: Run, dataset: Dataset, backbone: str, folder: Path) -> tuple[list[WindowResult], dict[str, Any]]:
    """Train with sliding and with anchored windows; returns both, and anchored minus sliding with its interval.

    The `tiny` backbone is pre-trained once: its text does not depend on the window.
    """
    results: list[WindowResult] = []
    for window in ("sliding", "anchored"):
        template = run.config.template.model_copy(update={"window": window})
        # All rows of valid choose checkpoints: a limit would leave out other rows for each window.
        rows = dataset.splits["valid"].height
        config = run.config.model_copy(update={"template": template, "validation_rows": rows})
        part = Run(folder / window, config, run.accelerator, run.console)
        if results and backbone == TINY and not (part.folder / "backbone").exists():
            part.folder.mkdir(parents=True, exist_ok=True)
            shutil.copytree(folder / "sliding" / "backbone", part.folder / "backbone")
        bundle = folder / f"{window}.bundle"
        if not bundle.exists():
            fit(part, dataset, backbone, bundle, resume=True)
        results.append(_window_result(part, dataset, bundle))
    valid = dataset.splits["valid"]
    users = np.unique(valid["user_id"].to_numpy(), return_inverse=True)[1]
    labels = valid["label"].to_numpy()
    difference = paired_difference(results[1].logits_B, results[0].logits_B, labels, users)
    return results, {metric: interval.as_dict() for metric, interval in difference.items()}


def tokens_per_target(examples: Examples, targets: Targets, kind: PromptKind) -> tuple[float, float]:
    """Return tokens computed per target: packed as trained, and with a prompt for each target."""
    packs = [examples.pack(kind, targets, rows) for rows in targets.groups]
    return (
        sum(pack.tokens for pack in packs) / len(targets),
        sum(pack.tokens_alone for pack in packs) / len(targets),
    )


def _window_result(run: Run, dataset: Dataset, bundle: Path) -> WindowResult:
    opened = Bundle.open(bundle)
    histories = build_histories(dataset, run.config.ties)
    examples = Examples(dataset, histories, Template(run.config.template, opened.encoder()))
    train = examples.targets("train", run.config.max_targets)
    logits_B = read_tensors(run.folder / "project_valid.safetensors")[0]["logits"].numpy()
    return WindowResult(
        run.config.template.window,
        {kind.value: tokens_per_target(examples, train, kind) for kind in PromptKind},
        opened.manifest.metrics["stages"],
        logits_B,
    )


def _seeded(run: Run, seed: int) -> Run:
    return Run(run.folder, run.config.model_copy(update={"seed": seed}), run.accelerator, run.console)


def _collab(run: Run, prepared: Prepared, seed: int, *, alignment: float) -> Collab:
    config: Config = run.config.model_copy(
        update={"seed": seed, "align": run.config.align.model_copy(update={"alignment": alignment})}
    )
    folder = run.folder / "alignment" / f"seed {seed}, {alignment}"
    return align(Run(folder, config, run.accelerator, run.console), prepared.examples, prepared.semantic_ID)


def _step_zero(run: Run, prepared: Prepared, collab: Collab, valid: Targets, *, fresh: bool) -> float:
    trained_user, trained_item = collab.user_trained_U.numpy(), collab.item_trained_I.numpy()
    warm = valid.only(trained_user[valid.user_B] & trained_item[valid.item_B])
    if not warm.groups:
        raise DataError(f"{prepared.examples.dataset.file_of('valid')}: no row has a user and an item of train")
    rows = np.concatenate(warm.groups)
    projections = initial_projections(run, prepared.backbone, collab, fresh_collab=fresh)
    folded = {valid.split: folded_users(prepared.examples, valid, collab)}
    tables = SlotTables(collab).to(run.device)
    model, head = TreeModel(prepared.backbone), Head(0.0, 0.0, 1.0)
    forward = SlotForward(run, model, projections.to(run.device), tables, head, folded)
    logits_B = forward.predict(prepared.examples, warm)
    area = auc(logits_B[rows], valid.label_B[rows])
    return float("nan") if area is None else area
