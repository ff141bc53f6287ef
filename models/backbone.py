"""The language model: any Hugging Face causal LM with its tokenizer, its LoRA, and its two answer rows.

Shapes: B sequences, T tokens, D = d_L, K answers.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from models.definition import CONFIG, TOKENIZER, Definition
from models.tokens import AnswerTokens, TextEncoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class BackboneError(ValueError):
    """A backbone that cannot be loaded or cannot score; the message says which one and why."""


class Backbone:
    """A causal LM used as a scorer: embeddings in, last hidden states out, two rows of the head."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, config: Mapping[str, Any] | None = None
    ) -> None:
        """`config` holds the fields of config.json as they were read; without it the fields come from the model."""
        # transformers' and peft's decorators hide their own signatures, so the model is typed as what it is here.
        self.model: Any = model
        self._has_lora = False
        self._config = dict(config or json.loads(model.config.to_json_string()))
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer)
        self.answers: AnswerTokens = self.encoder.answers()

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face model, LoRA layers in place if attached."""
        return self.model.get_base_model() if self._has_lora else self.model

    @property
    def d_model(self) -> int:
        """d_L, the width of the embeddings."""
        return int(self.causal_lm.get_input_embeddings().embedding_dim)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.causal_lm.get_input_embeddings().weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        dtype: torch.dtype = self.causal_lm.get_input_embeddings().weight.dtype
        return dtype

    @property
    def parameters(self) -> int:
        """How many weights the language model has, shared ones once, an adapter that is not merged left out."""
        return sum(one.numel() for name, one in self.causal_lm.named_parameters() if "lora_" not in name)

    def embed(self, token_ids_BT: Tensor) -> Tensor:
        """Return the input embeddings, `(B, T, D)`."""
        embeds: Tensor = self.causal_lm.get_input_embeddings()(token_ids_BT)
        return embeds

    def twin(self, attention: str) -> Any:
        """Return a structural copy of the language model with another attention function; it shares all weights.

        Raises:
            BackboneError: the architecture does not take attention functions of transformers' interface.
        """
        causal_lm = self.causal_lm
        if not getattr(causal_lm, "_supports_attention_backend", False):
            raise BackboneError(
                f"{type(causal_lm).__name__}: it does not take attention functions of transformers' interface"
            )
        weights = {id(tensor): tensor for tensor in (*causal_lm.parameters(), *causal_lm.buffers())}
        twin: Any = copy.deepcopy(causal_lm, weights)
        twin.set_attn_implementation(attention)
        return twin

    def answer_logits(self, hidden_KD: Tensor) -> Tensor:
        """Return `l_yes - l_no`, fp32, shape (K,): two rows of the head, never the vocabulary (Eqs. 2-3).

        States and rows are cast to fp32 before they are subtracted: in bf16 the difference of two large logits keeps
        two digits.
        """
        head = self.causal_lm.get_output_embeddings()
        rows_2D = head.weight[[self.answers.yes, self.answers.no]].float()
        with torch.autocast(hidden_KD.device.type, enabled=False):
            logits = hidden_KD.float() @ (rows_2D[0] - rows_2D[1])
        bias = getattr(head, "bias", None)
        if bias is not None:
            logits = logits + (bias[self.answers.yes].float() - bias[self.answers.no].float())
        return cast(Tensor, logits)

    def embedding_norm(self) -> float:
        """Return the mean norm of the token embeddings."""
        return float(self._embeddings_VD().norm(dim=-1).mean())

    def embedding_of(self, text: str) -> Tensor:
        """Return the mean embedding of a text's tokens, `(D,)` fp32."""
        return self._embeddings_VD()[self.encoder.encode(text)].mean(0)

    def _embeddings_VD(self) -> Tensor:  # noqa: N802
        weights: Tensor = self.causal_lm.get_input_embeddings().weight
        return weights.detach().float()

    def freeze(self) -> None:
        """Freeze every weight and leave training mode."""
        self.model.requires_grad_(False)
        self.model.eval()

    def attach_lora(self, rank: int, alpha: int, dropout: float, *, cast_inputs: bool = True) -> None:
        """Attach LoRA to every linear layer of the blocks; the base stays frozen (Table 1, stage 1).

        `cast_inputs` casts an adapter's input to fp32. Switch it off under autocast, which casts it back to bf16.
        """
        from peft import LoraConfig, get_peft_model  # here, so that scoring alone does not need it
        from peft.tuners.lora import LoraLayer

        if self._has_lora:
            raise BackboneError("LoRA is already attached")
        config = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.model = get_peft_model(self.model, config)
        self._has_lora = True
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = cast_inputs
        # PEFT keeps the layers' names as a set, whose order changes from process to process; files must not.
        self.model.peft_config["default"].target_modules = sorted(cast(set[str], config.target_modules))

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})

    def load_lora(self, adapter: Path) -> None:
        """Attach a saved adapter.

        Raises:
            BackboneError: the adapter does not fit this model.
        """
        from peft import PeftModel

        try:
            self.model = PeftModel.from_pretrained(self.causal_lm, str(adapter))
            self._has_lora = True
        except (RuntimeError, ValueError, OSError) as error:
            raise BackboneError(f"{adapter}: the adapter does not fit the backbone: {error}") from error

    def merge_lora(self, dtype: torch.dtype) -> None:
        """Merge the adapter in fp32, then cast.

        Merged in bf16 the weights differ from those merged in fp32 and cast; merging once, here, keeps the weights
        that distil, train stage 3, evaluate and serve the same.
        """
        if self._has_lora:
            self.model = self.model.float().merge_and_unload()
            self._has_lora = False
        self.model = self.model.to(dtype)
        self.freeze()

    def save(self, folder: Path) -> None:
        """Save model and tokenizer as safetensors and JSON."""
        self.causal_lm.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)

    def definition(self) -> Definition:
        """Return the tokenizer and the configuration as files; the configuration has the fields that were read."""
        with tempfile.TemporaryDirectory() as scratch:
            self.tokenizer.save_pretrained(scratch)
            saved = Definition.read(Path(scratch))
        config = {key: value for key, value in self._config.items() if key != "_name_or_path"}
        return Definition({**saved.files, CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()})

    def weights_id(self) -> str:
        """Return a hash of the weights and of their dtype, as they are in memory."""
        digest = hashlib.sha256(str(self.dtype).encode())
        for name, tensor in sorted(self.causal_lm.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def load_backbone(
    source: str | Path, *, definition: Path | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Backbone:
    """Load a causal LM and its fast tokenizer from a local path or a hub id, in fp32 or bf16.

    `definition` is a folder whose tokenizer and config.json replace the source's own.

    Raises:
        BackboneError: the source cannot be loaded.
        TokenizerError: Yes or No is not a single token.
    """
    described = definition or source
    try:
        tokenizer = load_tokenizer(described)
        found: Any = AutoModelForCausalLM.from_pretrained(
            str(source),
            config=AutoConfig.from_pretrained(str(described)),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise BackboneError(f"backbone {source}: {first_line(error)}") from error
    model, loaded = found
    if missing := sorted(loaded["missing_keys"]):  # transformers would fill them with random numbers and only warn
        raise BackboneError(f"backbone {source}: its files lack {len(missing)} tensors, among them {missing[0]}")
    config = Path(described) / CONFIG
    fields = json.loads(config.read_text()) if config.is_file() else None
    backbone = Backbone(model.to(device), tokenizer, fields)
    backbone.freeze()
    return backbone


def load_merged(source: str | Path, adapter: Path, *, dtype: torch.dtype, device: str = "cpu") -> Backbone:
    """Load a backbone with its adapter merged in: the weights that distil, train stage 3, evaluate and serve.

    Raises:
        BackboneError: one of the two cannot be loaded, or they do not fit.
    """
    backbone = load_backbone(source, device=device)
    backbone.load_lora(adapter)
    backbone.merge_lora(dtype)
    return backbone


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer from a local path or a hub id.

    A local tokenizer.json is taken as it is: `AutoTokenizer` with model_type qwen2 replaces a custom pre-tokenizer
    with Qwen2's own, silently.

    Raises:
        BackboneError: its tokenizer.json cannot be read.
        OSError, ValueError: there is no tokenizer.
    """
    file = Path(source) / TOKENIZER
    if file.is_file():
        try:
            loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(str(source))
        except Exception as error:  # tokenizers raises Exception itself for a file that it cannot read
            raise BackboneError(f"{file}: not a tokenizer: {first_line(error)}") from error
        return loaded
    auto: Any = AutoTokenizer.from_pretrained(str(source))
    return cast(PreTrainedTokenizerFast, auto)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that take gradients."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, for a one-line error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
