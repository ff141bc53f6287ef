"""The training configuration: one frozen model, unknown keys rejected, every default with its reason.

Measured reasons refer to the `tiny` backbone on MovieLens-1M; `docs/results.md` has the figures.
"""

import json
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.template import TemplateConfig
from training.data.history import Ties

Until = Literal["adapt", "align"]  # the stages after which `fit` can end
TINY = "tiny"  # the name of the stand-in as a backbone


class ConfigError(ValueError):
    """A configuration file that cannot be used; the message names the key and the mend."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ScheduleConfig(_Frozen):
    """How a stage steps: AdamW under a linear warm-up and a linear decay to zero."""

    epochs: float = Field(2.0, gt=0, description="passes over the train rows")
    learning_rate: float = Field(1e-3, gt=0, description="after the warm-up, before the decay")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps")
    batch_targets: int = Field(64, ge=1, description="targets a step, over all processes")
    second_moment: float = Field(
        0.999, gt=0, lt=1, description="decay of AdamW's second moment (beta 2); 0.95 averages over about 20 steps"
    )
    gradient_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    evaluations_per_epoch: int = Field(2, ge=1, description="how often valid is scored; the best checkpoint is kept")
    patience: int = Field(4, ge=1, description="evaluations without a better validation AUC before the stage stops")
    min_steps: int = Field(0, ge=0, description="small data sets run more epochs, until the stage has made this many")
    max_steps: int | None = Field(None, ge=1, description="the stage makes at most this many steps")


class TinyConfig(_Frozen):
    """The `tiny` stand-in: a Qwen2 of about 5 M parameters, made and pre-trained from the training text alone."""

    vocabulary: int = Field(
        4096, ge=300, description="size of the byte-level BPE; a larger one gains nothing on ML-1M's titles"
    )
    d_model: int = Field(256, ge=16, description="width of the embeddings")
    d_inner: int = Field(1024, ge=16, description="inner width of the feed-forward layers")
    layers: int = Field(4, ge=1, description="transformer layers")
    heads: int = Field(4, ge=1, description="attention heads")
    key_value_heads: int = Field(2, ge=1, description="heads of keys and values; attention heads share them")
    sequence_tokens: int = Field(256, ge=32, description="tokens of one text block in its pre-training")
    question_groups: int = Field(4, ge=1, description="packs in each step that teach the model to answer (pretrain.py)")
    # Reading the slots takes 250 steps, however little text there is.
    schedule: ScheduleConfig = ScheduleConfig(
        epochs=5, learning_rate=2e-3, weight_decay=0.05, batch_targets=16, min_steps=250
    )


class AdaptConfig(_Frozen):
    """Stage 1: LoRA on Fig. 2's prompt."""

    rank: int = Field(
        16, ge=1, description="rank of LoRA on all linear layers; CoLLM's rank 8 on two of them learns less on Qwen2"
    )
    alpha: int = Field(32, ge=1, description="scale of LoRA; twice the rank, as usual")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="dropout of LoRA; one epoch does not overfit without it, and on a CPU it costs a third",
    )
    titles: int = Field(
        64,
        ge=0,
        description="titles without a history in each step; each learns from all train rows of its item",
    )
    leniency: bool = Field(
        True,
        description="in training, add the user's own rate of positives (log-odds) to the logit, so that the language"
        " model learns how items differ",
    )
    # At 1e-4 a small model's AUC stays at chance. The first gradients are large, because the model at first favours one
    # answer for nearly every row: AdamW's second moment must forget them. 400 steps limit the time on a CPU.
    schedule: ScheduleConfig = ScheduleConfig(
        epochs=1, learning_rate=1e-3, evaluations_per_epoch=2, max_steps=400, second_moment=0.95
    )


class AlignConfig(_Frozen):
    """Stage 2: matrix factorisation with alignment (Eqs. 6-9)."""

    d_collab: int = Field(64, ge=3, description="the paper's smallest; two of them hold the biases")
    d_hidden: int = Field(256, ge=1, description="inner width of Eq. 7's projection")
    alignment: float = Field(0.3, ge=0, description="lambda of Eq. 9")
    temperature: float = Field(0.1, gt=0, description="tau of Eq. 8")
    init_std: float = Field(0.05, gt=0, description="of p and q at the start")
    factor_decay: float = Field(4.0, ge=0, description="L2 on p and q, in interactions")
    user_bias_decay: float = Field(12.0, ge=0, description="L2 on b_u, in interactions: leniency needs evidence")
    item_bias_decay: float = Field(2.0, ge=0, description="L2 on b_i, in interactions")
    bias_rate: float = Field(5.0, gt=0, description="learning rate of the biases, relative")
    semantic_rate: float = Field(0.15, ge=0, description="learning rate of the semantic deltas, relative")
    turns: int = Field(
        4, ge=1, description="how often items and users are fitted in closed form; the best turn is kept"
    )
    ridge: float = Field(
        0.3, gt=0, description="ridge of the map from text to collab vectors, relative to the text's variance"
    )
    schedule: ScheduleConfig = ScheduleConfig(
        epochs=25, learning_rate=2e-3, batch_targets=1024, evaluations_per_epoch=1, patience=25
    )


class ProjectConfig(_Frozen):
    """Stage 3: both projections, language model frozen (Eqs. 10-11)."""

    form: Literal["correction", "paper"] = Field(
        "correction",
        description="correction: the answer is stage 2's prediction plus the language model's logit, whose weight"
        " starts small, and stage 2's vectors stay as they are; paper: the logit alone is the answer, and the"
        " vectors are trained too",
    )

    slot_scale: float = Field(
        0.2,
        gt=0,
        description="mean distance at the start between a projected vector and the embedding of a full stop, in mean"
        " token embedding norms; with long vectors a language model loses what stage 1 taught it",
    )
    cold_users: float = Field(0.3, ge=0, le=1, description="share of targets whose user is folded in instead")
    cold_items: float = Field(0.1, ge=0, le=1, description="share of targets whose item is mapped from text instead")
    table_rate: float = Field(
        0.1, ge=0, description="learning rate of the tables, relative to the projections'; for form paper only"
    )
    table_decay: float = Field(0.0, ge=0, description="pull of the tables back to stage 2's vectors")
    schedule: ScheduleConfig = ScheduleConfig(epochs=0.6, learning_rate=1e-3, evaluations_per_epoch=2, max_steps=100)


class Config(_Frozen):
    """Everything a `fit` depends on besides the data and the backbone."""

    seed: int = Field(
        0, ge=0, lt=2**32, description="seed of every random draw; equal seeds give equal bundles on a CPU"
    )
    template: TemplateConfig = TemplateConfig()
    ties: Ties = Field(
        "strict",
        description="strict: a history has no row of the row's own second; file-order: it has the earlier ones"
        " (docs/data.md)",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="type of the merged weights in embedding, training and serving; auto: float32 for tiny, bfloat16"
        " for the rest",
    )
    autocast: bool = Field(True, description="bf16 products in training; weights and gradients stay in their type")
    max_tokens: int = Field(1024, ge=64, description="tokens of one forward and backward")
    max_targets: int = Field(16, ge=1, description="targets of one pack, so that a batch mixes users")
    validation_rows: int = Field(2_000, ge=1, description="rows of valid that choose checkpoints")
    checkpoint_seconds: float = Field(30.0, gt=0, description="time between checkpoints, from which --resume goes on")
    gradient_checkpointing: bool = Field(False, description="recompute activations: a third slower, far less memory")
    tiny: TinyConfig = TinyConfig()
    adapt: AdaptConfig = AdaptConfig()
    align: AlignConfig = AlignConfig()
    project: ProjectConfig = ProjectConfig()

    @model_validator(mode="after")
    def _batches_fit(self) -> "Config":
        if self.template.history_tokens + 300 > self.max_tokens:
            raise ValueError(f"max_tokens {self.max_tokens} does not hold one prompt; raise it to history_tokens + 300")
        return self

    def number_type(self, backbone: str) -> Literal["float32", "bfloat16"]:
        """Return the type of the merged weights for a backbone as `fit` names it."""
        if self.dtype == "auto":
            return "float32" if backbone == TINY else "bfloat16"
        return self.dtype

    @classmethod
    def changed_by(cls, given: Any) -> "Config":
        """Return the defaults with the keys that are given, at any depth, in their place.

        Without a plural, it is the given noun with an s. `template.model_fields_set` has the keys that were given.

        Raises:
            ValidationError: a key or value that does not belong.
        """
        config = cls.model_validate(_laid_over(cls().model_dump(), given))
        named = dict(given.get("template", {}))
        if "noun" in named:
            named.setdefault("plural", f"{named['noun']}s")
        return config.model_copy(update={"template": TemplateConfig.model_validate(named)})

    def calling_items(self, noun: str | None, plural: str | None) -> "Config":
        """Return the configuration with another noun for an item; without a plural, it is the noun with an s.

        Raises:
            ConfigError: a plural without a noun, or a word that is too long.
        """
        if noun is None and plural is None:
            return self
        named = self.template.model_dump(include=self.template.model_fields_set)
        if noun is None and "noun" not in named:
            raise ConfigError(f"--plural {plural}: it takes --noun beside it")
        words = {"noun": noun or named["noun"], "plural": plural or f"{noun}s"}
        try:
            return self.model_copy(update={"template": TemplateConfig.model_validate(named | words)})
        except ValidationError as error:
            raise ConfigError(
                f"--noun {words['noun']}, --plural {words['plural']}: {error.errors()[0]['msg']}"
            ) from error


def load_config(path: Path | str | None) -> Config:
    """Read a configuration: a JSON file, the name of one that comes with sella, or None for the defaults.

    A file changes what it names and nothing else, at any depth: `{"adapt": {"schedule": {"epochs": 2}}}` keeps stage
    1's learning rate.

    Raises:
        ConfigError: no such file, or a key or value that does not belong.
    """
    if path is None:
        return Config()
    named = resources.files("training") / "configs" / f"{path}.json"
    try:
        text = named.read_text() if named.is_file() else Path(path).read_text()
        return Config.changed_by(json.loads(text))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; sella's own are {', '.join(shipped_configs())}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the whole"
        raise ConfigError(f"{path}: {key}: {first['msg']}") from error


def _laid_over(defaults: dict[str, Any], given: Any) -> Any:
    """Return the defaults with what is given in their place."""
    if not isinstance(given, dict):
        return given
    parts = {
        key: _laid_over(defaults[key], value) if isinstance(defaults.get(key), dict) else value
        for key, value in given.items()
    }
    return defaults | parts


def shipped_configs() -> list[str]:
    """Return the names of the configurations that come with sella."""
    folder = resources.files("training") / "configs"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))
