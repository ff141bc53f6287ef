"""Random weights of a model's shape: made once a run, and read by every scorer of it."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from loadtests.bench.shapes import D_COLLAB, D_HIDDEN, NO, YES, ModelShape
from models.backbone import DTYPES, Backbone
from models.projection import Projections


def make_model(shape: ModelShape, device: str) -> PreTrainedModel:
    """Make a random Qwen2 of that shape on the device. Equal calls on one kind of device give equal weights."""
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.shared_heads,
        max_position_embeddings=32_768,
        tie_word_embeddings=shape.tied,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = Qwen2ForCausalLM._from_config(config, dtype=DTYPES[shape.dtype])
    model.eval().requires_grad_(False)
    return model


def make_projections(shape: ModelShape, backbone: Backbone) -> Projections:
    """Make random projections whose outputs are as long as the model's embeddings."""
    torch.manual_seed(1)
    projections = Projections(D_COLLAB, D_HIDDEN, shape.d_model)
    norm = backbone.embedding_norm()
    projections.collab.start_at(torch.randn(64, D_COLLAB), torch.zeros(shape.d_model), norm)
    projections.warm.start_at(torch.randn(64, shape.d_model), torch.zeros(shape.d_model), norm)
    return projections.requires_grad_(False)


def tokenizer_of_two_words() -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows the answers; the requests are token ids already."""
    vocabulary = {"<unk>": 0, "Yes": YES, "No": NO}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")), unk_token="<unk>"
    )


def save(shape: ModelShape, folder: Path) -> None:
    """Write a model and its projections, for scorers in processes of their own."""
    model = make_model(shape, "cpu")
    model.save_pretrained(folder, safe_serialization=True)
    projections = make_projections(shape, Backbone(model, tokenizer_of_two_words()))
    # In a folder of its own: vLLM takes every safetensors file beside the model for a part of it.
    (folder / "projections").mkdir()
    save_file(projections.state_dict(), folder / "projections" / "projection.safetensors")


def load(shape: ModelShape, folder: Path | None, device: str) -> tuple[Backbone, Projections]:
    """Read what `save` wrote, or make it on the device if there is no folder."""
    if folder is None:
        backbone = Backbone(make_model(shape, device), tokenizer_of_two_words())
        return backbone, make_projections(shape, backbone).to(device)
    # transformers' decorators hide their own signatures.
    model: Any = Qwen2ForCausalLM.from_pretrained(folder, dtype=DTYPES[shape.dtype], use_safetensors=True)
    backbone = Backbone(model.to(device).eval().requires_grad_(False), tokenizer_of_two_words())
    return backbone, load_projections(shape, folder).to(device)


def load_projections(shape: ModelShape, folder: Path) -> Projections:
    """Read the projections that `save` wrote."""
    projections = Projections(D_COLLAB, D_HIDDEN, shape.d_model)
    projections.load_state_dict(load_file(folder / "projections" / "projection.safetensors"))
    return projections.requires_grad_(False)
