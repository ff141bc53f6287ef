import re

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from models.backbone import Backbone, BackboneError
from models.probe import probe
from models.template import Template, TemplateConfig
from tests.tiny import tiny_backbone, tiny_tokenizer, tokenizer_with_bos

SIZES = {
    "vocab_size": 420,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


def backbone_of(model: PreTrainedModel) -> Backbone:
    backbone = Backbone(model, tiny_tokenizer())
    backbone.freeze()
    return backbone


def probed(backbone: Backbone, **template: int) -> float:
    return probe(backbone, Template(TemplateConfig(**template), backbone.encoder))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_plain_causal_architectures_pass() -> None:
    assert probed(tiny_backbone()) < 1e-4
    assert probed(backbone_of(LlamaForCausalLM(LlamaConfig(**SIZES)))) < 1e-3
    assert probed(backbone_of(Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)))) < 1e-3


def test_architectures_whose_last_layer_cannot_be_trimmed_pass() -> None:
    config = GPT2Config(vocab_size=420, n_embd=32, n_layer=2, n_head=4, n_positions=1024, initializer_range=0.3)
    assert probed(backbone_of(GPT2LMHeadModel(config))) < 1e-3


def test_a_soft_cap_on_the_attention_is_refused() -> None:
    config = Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=None, attn_logit_softcapping=5.0)
    with pytest.raises(BackboneError, match="softcap"):
        probed(backbone_of(Gemma2ForCausalLM(config)))


def test_a_sliding_window_shorter_than_a_prompt_is_refused() -> None:
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16))
    with pytest.raises(
        BackboneError,
        match=r"its sliding_window is 16 and the longest prompt takes [0-9]+ tokens; choose another backbone",
    ):
        probed(backbone_of(model))


def test_a_window_is_refused_with_the_history_that_would_fit() -> None:
    config = LlamaConfig(**SIZES, max_position_embeddings=700)
    with pytest.raises(BackboneError, match="max_position_embeddings is 700 and the longest prompt takes") as refused:
        probed(backbone_of(LlamaForCausalLM(config)), style="paper")
    [fitting] = re.findall(r"set template\.history_tokens to (\d+) or less", str(refused.value))
    probed(backbone_of(LlamaForCausalLM(config)), style="paper", history_tokens=int(fitting))
    with pytest.raises(BackboneError, match="max_position_embeddings is 700"):
        probed(backbone_of(LlamaForCausalLM(config)), style="paper", history_tokens=int(fitting) + 1)
    smaller = backbone_of(LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=280)))
    with pytest.raises(
        BackboneError, match=r"history_tokens to 0 and template\.title_tokens to \d+ or less"
    ) as refused:
        probed(smaller, style="paper")
    [fitting] = re.findall(r"title_tokens to (\d+) or less", str(refused.value))
    probed(smaller, style="paper", history_tokens=0, title_tokens=int(fitting))


def test_a_bos_token_that_the_prompt_lacks_is_found() -> None:
    backbone = Backbone(LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 421})), tokenizer_with_bos())
    backbone.freeze()
    assert backbone.encoder.lead == (backbone.tokenizer.bos_token_id,)
    assert probed(backbone) < 1e-3
    backbone.encoder.lead = ()
    with pytest.raises(BackboneError, match="differ from the model's own"):
        probed(backbone)


def test_alibi_is_refused() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=420, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3))
    with pytest.raises(BackboneError, match="BloomForCausalLM"):
        probed(backbone_of(model))


def test_a_soft_cap_on_the_logits_is_refused() -> None:
    config = Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=1.0, attn_logit_softcapping=None)
    with pytest.raises(BackboneError, match="Gemma2ForCausalLM"):
        probed(backbone_of(Gemma2ForCausalLM(config)))
