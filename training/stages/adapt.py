"""Stage 1: LoRA teaches the language model to answer Yes or No on text alone (section 4.1), then distils items.

Table 1: backbone frozen, LoRA trained; no collab vectors yet.

The paper does not have these two additions. With them a small model learns in a few hundred steps (docs/results.md):

- Some users like nearly everything, others nearly nothing, and the text does not show this leniency. The rows of a user
  are in one step, so leniency dominates the step's gradient. Training therefore adds the log-odds of the user's own
  rate of positives, counted without the row, to the logit: the language model learns how items differ.
- Each step also contains many titles without a history. All rows of an item then have the same prompt, so one short
  branch of a pack learns from all of them.

Shapes: B rows of train, N rows that learn from one forward.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.backbone import Backbone, load_backbone
from models.fusion import Rates
from models.packed import PackedModel
from models.packs import Pack
from models.prompt_tree import TreeModel, lay_out
from models.template import PromptKind
from training.examples import (
    Examples,
    Int32,
    RowsByItem,
    Targets,
    answer_loss,
    forwards,
    rows_in,
    rows_of,
    shuffled_steps,
)
from training.fusion import fit_rates
from training.loop import StageLoop, derived_seed
from training.prediction import figures, predict
from training.run import Run, read_tensors, write_json, write_tensors

KIND = PromptKind.ADAPT


def adapt(run: Run, examples: Examples, source: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Train the adapter on Fig. 2's prompt; return its folder. An adapter that is already finished is used as it is.

    `dtype` is the type of the frozen weights; the adapter's weights are fp32.
    """
    folder = run.folder / "adapter"
    if (folder / "adapter_config.json").exists():
        return folder
    config = run.config.adapt
    backbone = load_backbone(source, dtype=dtype, device=str(run.device))
    torch.manual_seed(derived_seed(run.config.seed, "lora"))
    backbone.attach_lora(config.rank, config.alpha, config.dropout, cast_inputs=not run.config.autocast)
    if run.config.gradient_checkpointing:
        backbone.checkpoint_activations()
    model = TreeModel(backbone)
    train = examples.targets("train", run.config.max_targets)
    valid = examples.targets("valid", run.config.max_targets)
    judged = valid.limited(run.config.validation_rows)

    def forward(batch: Sequence[tuple[Pack, Int32]]) -> Tensor:
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.autocast):
            return model.logits(lay_out([pack for pack, _ in batch]).to(run.device))

    def evaluate() -> dict[str, float | None]:
        model.decoder.eval()
        return figures(predict(run, examples, KIND, judged, forward), judged)

    by_item = RowsByItem(train)
    offset_B = torch.zeros(len(train))
    if config.leniency:
        offset_B = leniency(train, fit_rates(examples.dataset.splits["train"]))

    def plan(rng: np.random.Generator) -> list[tuple[list[Int32], Int32]]:
        steps = shuffled_steps(train, config.schedule.batch_targets, rng)
        return list(zip(steps, by_item.dealt(len(steps), config.titles, rng), strict=True))

    parameters = {name: one for name, one in backbone.model.named_parameters() if one.requires_grad}
    rates = [(parameters, 1.0, config.schedule.weight_decay)]
    loop = StageLoop(
        run, "adapt", rates, config.schedule, plan, evaluate, rows=lambda step: rows_in(step[0]) + len(step[1])
    )
    if not loop.restore():
        for step in loop.steps():
            model.decoder.train()
            for part in run.share(step_parts(run, examples, train, by_item, *step)):
                logits_N = forward(part.batch)[torch.from_numpy(part.answer_N).to(run.device)]
                loss = answer_loss(logits_N + offset_B[part.rows_N].to(run.device), train, part.rows_N)
                loop.backward(loss / part.total)
    loop.keep_best()
    model.decoder.eval()
    logits_B = predict(run, examples, KIND, judged, forward)
    if run.is_main:
        write_tensors(run.folder / "adapt_valid.safetensors", {"logits": torch.from_numpy(logits_B)})
        scratch = run.folder / ".adapter.part"
        _save_adapter(backbone, scratch)
        write_json(run.folder / "adapt.json", {"evaluations": loop.evaluations})
        scratch.rename(folder)
    run.accelerator.wait_for_everyone()
    return folder


def leniency(train: Targets, rates: Rates) -> Tensor:
    """Return what training adds to each row's logit, `(B,)`.

    It is the log-odds of the user's smoothed rate of positives, counted without the row, minus those of the base rate.
    """
    impressions_U = np.bincount(train.user_B)
    labels_B = train.label_B.astype(np.int64)
    positives_U = np.bincount(train.user_B, weights=labels_B).astype(np.int64)
    positives_B = positives_U[train.user_B] - labels_B
    distance_B = rates.distance(positives_B, impressions_U[train.user_B] - 1, rates.user_strength)
    return torch.from_numpy(distance_B).float()


@dataclass(frozen=True)
class Part:
    """One forward of a step."""

    batch: Sequence[tuple[Pack, Int32]]
    rows_N: Int32  # the train rows that learn from it
    answer_N: Int32  # for each row, the index of its logit among the forward's answers
    total: float  # divisor of the summed loss


def step_parts(
    run: Run, examples: Examples, train: Targets, by_item: RowsByItem, groups: list[Int32], items: Int32
) -> list[Part]:
    """Cut a step into forwards: the groups' rows with their histories, and all rows of the items without a history.

    The step's loss is the mean of two mean losses, one for each kind; without items it is that of the groups' rows.
    """
    size, max_tokens = run.config.max_targets, run.config.max_tokens
    packs = [(examples.pack(KIND, train, rows), rows) for rows in groups]
    some = [items[start : start + size] for start in range(0, len(items), size)]
    title_packs = [(examples.title_pack(one), one) for one in some]
    with_history = [(batch, rows_of(batch)) for batch in forwards(packs, max_tokens)]
    kinds = [
        [(batch, rows, np.arange(len(rows), dtype=np.int32)) for batch, rows in with_history],
        [(batch, *by_item.of(rows_of(batch))) for batch in forwards(title_packs, max_tokens)],
    ]
    kinds = [kind for kind in kinds if kind]
    totals = [len(kinds) * sum(float(train.weight_B[rows_N].sum()) for _, rows_N, _ in kind) for kind in kinds]
    return [Part(*one, total) for kind, total in zip(kinds, totals, strict=True) for one in kind]


def _save_adapter(backbone: Backbone, folder: Path) -> None:
    """Save the adapter, equal bytes for equal runs: PEFT writes a set in any order, and the run's own path."""
    backbone.model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    described = json.loads((folder / "adapter_config.json").read_text())
    described["target_modules"] = sorted(described["target_modules"])
    described["base_model_name_or_path"] = None  # the manifest names the backbone
    write_json(folder / "adapter_config.json", described)


def distil_items(run: Run, examples: Examples, backbone: Backbone) -> Tensor:
    """Return every catalogue item's semantic vector by Fig. 3's prompt, `(I, D)` fp32, from the merged weights."""
    path = run.folder / "distil.safetensors"
    if not path.exists():
        prompts = [examples.template.distil(title) for title in examples.titles]
        vectors = torch.zeros(len(prompts), backbone.d_model)
        mine = run.share(list(range(len(prompts))))
        if mine:
            packed = PackedModel(backbone)
            progress = run.inner_progress("item vectors", len(mine))
            vectors[mine] = torch.from_numpy(packed.distil([prompts[row] for row in mine], progress=progress.count))
        vectors = run.sum(vectors.to(run.device)).cpu()
        if run.is_main:
            write_tensors(path, {"semantic": vectors})
        run.accelerator.wait_for_everyone()
    return read_tensors(path)[0]["semantic"]
