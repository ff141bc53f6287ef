"""Stage 1: LoRA teaches the language model to answer Yes or No on text alone (section 4.1), then distils items.

Table 1: backbone frozen, LoRA trained; no collab vectors yet.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.backbone import Backbone, load_backbone
from models.packed import PackedModel
from models.packs import Pack
from models.prompt_tree import TreeModel, lay_out
from models.template import PromptKind
from training.examples import Examples, Int32, answer_loss, forwards, rows_in, rows_of, shuffled_steps
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

    def evaluate() -> dict[str, float]:
        model.decoder.eval()
        return figures(predict(run, examples, KIND, judged, forward), judged)

    def plan(rng: np.random.Generator) -> list[list[Int32]]:
        return shuffled_steps(train, config.schedule.batch_targets, rng)

    parameters = {name: one for name, one in backbone.model.named_parameters() if one.requires_grad}
    rates = [(parameters, 1.0, config.schedule.weight_decay)]
    loop = StageLoop(run, "adapt", rates, config.schedule, plan, evaluate, rows=rows_in)
    if not loop.restore():
        for groups in loop.steps():
            model.decoder.train()
            total = float(train.weight_B[np.concatenate(groups)].sum())
            packs = [(examples.pack(KIND, train, rows), rows) for rows in groups]
            for batch in run.share(list(forwards(packs, run.config.max_tokens))):
                loss = answer_loss(forward(batch), train, rows_of(batch))
                loop.backward(loss / total)
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
            vectors[mine] = torch.from_numpy(
                packed.distil([prompts[row] for row in mine], run.config.max_tokens, progress.count)
            )
        vectors = run.sum(vectors.to(run.device)).cpu()
        if run.is_main:
            write_tensors(path, {"semantic": vectors})
        run.accelerator.wait_for_everyone()
    return read_tensors(path)[0]["semantic"]
