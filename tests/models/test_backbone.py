from pathlib import Path

import pytest
import torch

from models.backbone import BackboneError, load_backbone, load_merged
from models.loading import Bundle
from tests.tiny import tiny_backbone, tiny_titles


def test_a_saved_backbone_loads_with_the_same_tokens_and_weights(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    backbone.save(tmp_path)
    loaded = load_backbone(tmp_path)
    assert loaded.weights_id() == backbone.weights_id()
    for title in [*tiny_titles(12), "<|end|> Yes", "日本"]:
        assert loaded.encoder.encode(title) == backbone.encoder.encode(title)
        assert loaded.tokenizer.decode(loaded.encoder.encode(title)) == title
    assert loaded.answers == backbone.answers


def test_lora_is_merged_in_fp32_and_then_cast(bundle: Bundle) -> None:
    source, adapter = bundle.folder / "backbone", bundle.folder / "adapter"
    exact = load_merged(source, adapter, dtype=torch.float32).causal_lm.state_dict()
    cast = load_merged(source, adapter, dtype=torch.bfloat16).causal_lm.state_dict()
    plain = load_backbone(source).causal_lm.state_dict()
    assert all(torch.equal(cast[name], exact[name].bfloat16()) for name in exact)
    assert any(not torch.equal(plain[name], exact[name]) for name in exact)


def test_the_weights_id_sees_one_changed_weight() -> None:
    backbone = tiny_backbone()
    before = backbone.weights_id()
    backbone.causal_lm.get_output_embeddings().weight.data[3, 4] += 1e-3
    assert backbone.weights_id() != before


def test_what_cannot_be_loaded_is_named(tmp_path: Path, bundle: Bundle) -> None:
    with pytest.raises(BackboneError, match=str(tmp_path)):
        load_backbone(tmp_path)
    with pytest.raises(BackboneError, match="adapter"):
        tiny_backbone().load_lora(tmp_path)
