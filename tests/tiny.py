"""A complete random bundle on disk, built in about a second: what every test needs that needs a bundle.

Nothing in it is trained, everything in it is real: a random Qwen2 with its own byte-level BPE, a LoRA adapter with
non-zero weights, tables, projections, fusion. Equal arguments give equal bytes, and so an equal bundle id.

    bundle = tiny_bundle(tmp_path / "bundle")
    bundle.folder, bundle.id, bundle.tables(), bundle.model()

Users are "u0", "u1", ...; the last `cold_users` have no training data but a stored history, and the very last has
neither. Items are "i0", "i1", ...; the last `cold_items` have no training data. User "u0" has a history longer than
the prompt's window.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from models.backbone import Backbone, load_backbone
from models.bundle import BackboneEntry, Dimensions, FileEntry, Manifest, merged_id, write_bundle
from models.definition import Definition
from models.fusion import INPUTS, SIGNED, Fusion, Rates, Weight, Weights
from models.loading import Bundle
from models.projection import Projections
from models.template import TemplateConfig

Dtype = Literal["float32", "bfloat16"]

DAY_S = 86_400.0
HISTORY_END = 1_700_000_000.0  # when every user liked the last of the stored items
D_COLLAB, D_HIDDEN, D_MODEL = 8, 16, 48
WORDS = ("Amber", "Brave", "Copper", "Dark", "Étoile", "Frozen", "Golden", "Hidden", "Iron", "Jade", "Last", "Ночь")
NOUNS = ("Garden", "Harbour", "Island", "Journey", "Kingdom", "Letter", "Mirror", "Orchard", "Promise", "River")


@dataclass(frozen=True)
class TinySize:
    """How many users and items, and how many of them (the last ones) have no training data."""

    users: int = 20
    items: int = 40
    cold_users: int = 3
    cold_items: int = 5


def tiny_bundle(
    out: Path,
    *,
    seed: int = 0,
    rest_seed: int | None = None,
    size: TinySize | None = None,
    dtype: Dtype = "float32",
    template: TemplateConfig | None = None,
    d_model: int = D_MODEL,
    reference: dict[str, Any] | None = None,
    counted_until: float = HISTORY_END,
    since: float = HISTORY_END - 100 * DAY_S,
) -> Bundle:
    """Write a random bundle at `out` and open it.

    `rest_seed` makes other projections and tables around an equal language model. `since` is the time of every user's
    first row.
    """
    rest = seed if rest_seed is None else rest_seed
    size = size or TinySize()
    template = template or TemplateConfig()
    identity: dict[str, str | int] = {}

    def fill(folder: Path) -> None:
        backbone = tiny_backbone(seed, d_model)
        backbone.save(folder / "backbone")
        base_id = Definition.read(folder / "backbone").identify(load_backbone(folder / "backbone").weights_id())
        _write_adapter(backbone, folder / "adapter", seed)
        _write_tables(folder, size, rest, d_model, since)
        _write_projection(folder, backbone.embedding_norm(), rest, d_model)
        identity.update(
            base_id=base_id,
            merged_id=merged_id(base_id, folder / "adapter", dtype),
            parameters=backbone.parameters,
            yes_id=backbone.answers.yes,
            no_id=backbone.answers.no,
        )

    def manifest(files: dict[str, FileEntry]) -> Manifest:
        return Manifest(
            created_by="tests.tiny",
            backbone=BackboneEntry.model_validate({"source": "backbone", "dtype": dtype, **identity}),
            template=template,
            dimensions=Dimensions(
                d_collab=D_COLLAB, d_hidden=D_HIDDEN, d_model=d_model, users=size.users, items=size.items
            ),
            data_fingerprint="random",
            counted_until=counted_until,
            training={},
            seed=rest,
            metrics={},
            reference=reference or {},
            files=files,
        )

    write_bundle(out, manifest, fill)
    return Bundle.open(out)


def tiny_titles(count: int) -> list[str]:
    """Return `count` different titles, some with quotes, commas and letters outside ASCII."""
    return [f'{WORDS[i % 12]} {NOUNS[i // 12 % 10]}, "Part {i}" ({1950 + i % 70})' for i in range(count)]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of some 400 entries in which "Yes" and "No" are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    text = ["Yes\nNo\n" * 50, "The user's feature is. Target Movie: Answer:\n" * 10, *tiny_titles(60)]
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def tokenizer_with_bos() -> PreTrainedTokenizerFast:
    """Return the tiny tokenizer, made to begin every text with a BOS token, as Gemma's and Llama's do."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = ("<bos>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[bos]
    )
    return tokenizer


def tiny_backbone(seed: int = 0, d_model: int = D_MODEL) -> Backbone:
    """Return a random Qwen2 of two layers, in fp32; its weights are wide enough that scores differ visibly."""
    tokenizer = tiny_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=d_model,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    backbone = Backbone(model, tokenizer)
    backbone.freeze()
    return backbone


def _write_adapter(backbone: Backbone, folder: Path, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        backbone.attach_lora(rank=2, alpha=4, dropout=0.0)
        for name, parameter in backbone.model.named_parameters():
            if "lora_B" in name:  # PEFT starts B at zero, which would leave a merge untested
                parameter.data.normal_(std=0.1)
    assert isinstance(backbone.model, PeftModel)
    backbone.model.save_pretrained(str(folder))
    config = folder / "adapter_config.json"
    fields = json.loads(config.read_text())
    fields["target_modules"].sort()  # PEFT keeps a set, whose order differs from process to process
    config.write_text(json.dumps(fields, indent=2, sort_keys=True))


def _write_projection(folder: Path, norm: float, seed: int, d_model: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 2)
        projections = Projections(D_COLLAB, D_HIDDEN, d_model)
        projections.collab.start_at(torch.randn(64, D_COLLAB), torch.zeros(d_model), norm)
        projections.warm.start_at(torch.randn(64, d_model), torch.zeros(d_model), norm)
    save_torch_file(projections.state_dict(), folder / "projection.safetensors")


def _write_fusion(folder: Path, rng: np.random.Generator) -> None:
    """Give every input a weight, so that a score depends on all inputs of a pair."""

    def weights(intercept: float) -> Weights:
        values = {
            name: float(rng.normal() if name in SIGNED else rng.uniform(0.2, 0.8)) * (0.2 if name == "taste" else 1)
            for name in INPUTS
        }
        return Weights(
            intercept=intercept,
            weights={
                name: Weight(value=one, low=one - 0.1, high=one + 0.1, mean=0.4, most=1.5)
                for name, one in values.items()
            },
        )

    live, static = weights(-0.3), weights(-0.5)
    fusion = Fusion(rates=Rates(base=0.4, user_strength=10, item_strength=5), static=static, live=live)
    (folder / "fusion.json").write_text(fusion.model_dump_json())


def _counts(rows: int, trained: int, rng: np.random.Generator) -> dict[str, NDArray[np.int64]]:
    """Return random counts; those without training data were never shown."""
    impressions = np.where(np.arange(rows) < trained, rng.integers(1, 30, size=rows), 0)
    return {"impressions": impressions, "positives": rng.binomial(impressions, 0.4)}


def _write_tables(folder: Path, size: TinySize, seed: int, d_model: int, since: float) -> None:
    rng = np.random.default_rng(seed + 3)

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.normal(size=shape).astype(np.float32)

    root = normal(D_COLLAB, D_COLLAB)
    collab: dict[str, NDArray[np.float32]] = {
        "user_vectors": normal(size.users, D_COLLAB),
        "item_vectors": normal(size.items, D_COLLAB),
        "fold_vectors": normal(size.items, D_COLLAB),
        "prior_mean": normal(D_COLLAB),
        "prior_covariance": (root @ root.T / D_COLLAB).astype(np.float32),
    }
    semantic: dict[str, NDArray[np.float32]] = {
        "vectors": normal(size.items, d_model),
        "map_center": normal(d_model),
        "map_weight": normal(d_model, D_COLLAB) / np.float32(d_model**0.5),
        "map_offset": normal(D_COLLAB),
    }
    save_file(collab, folder / "collab.safetensors")
    save_file(semantic, folder / "semantic.safetensors")
    (folder / "fold_in.json").write_text(
        json.dumps(
            {"target": 1.0, "noise": 0.5, "outcome_noise": 0.4, "strength": 12.0}
            | {"drift_variance": 0.3, "drift_seconds": 30 * DAY_S}
        )
    )
    known_rng = np.random.default_rng(seed + 4)
    _write_fusion(folder, known_rng)
    item_ids = [f"i{row}" for row in range(size.items)]
    pl.DataFrame(
        {
            "item_id": item_ids,
            "title": tiny_titles(size.items),
            "trained": [row < size.items - size.cold_items for row in range(size.items)],
            **_counts(size.items, size.items - size.cold_items, known_rng),
        }
    ).write_parquet(folder / "items.parquet")
    totals = [23, *rng.integers(1, 14, size=size.users - 2).tolist(), 0][: size.users]
    histories = [[item_ids[i] for i in rng.integers(0, size.items, size=min(total, 10))] for total in totals]
    # A day between two likes, the last of every user on the same day.
    times = [[HISTORY_END - DAY_S * (len(one) - place - 1) for place in range(len(one))] for one in histories]
    counts = _counts(size.users, size.users - size.cold_users, known_rng)
    # Outcomes in valid: "u0" has as many as a bundle keeps, the last user but one has four, the last user none.
    known = [100, *known_rng.integers(0, 6, size=max(0, size.users - 3)).tolist(), 4, 0][-size.users :]
    outcomes = [[(item_ids[i], i % 3 > 0) for i in known_rng.integers(0, size.items, size=one)] for one in known]
    shown = [[HISTORY_END - DAY_S * (one - place) / 4 for place in range(one)] for one in known]
    seen = known_rng.integers(1, 30, size=size.users)
    seen[size.users - size.cold_users :] = 0
    pl.DataFrame(
        {
            "user_id": [f"u{row}" for row in range(size.users)],
            "trained": [row < size.users - size.cold_users for row in range(size.users)],
            "history": pl.Series(histories, dtype=pl.List(pl.String)),
            "history_times": pl.Series(times, dtype=pl.List(pl.Float64)),
            "history_total": totals,
            "outcome_items": pl.Series([[one for one, _ in told] for told in outcomes], dtype=pl.List(pl.String)),
            "outcome_labels": pl.Series([[one for _, one in told] for told in outcomes], dtype=pl.List(pl.Boolean)),
            "outcome_times": pl.Series(shown, dtype=pl.List(pl.Float64)),
            "train_impressions": seen,
            "since": [since] * size.users,
            **counts,
        }
    ).write_parquet(folder / "users.parquet")
