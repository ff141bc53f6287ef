import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.backbone import BackboneError, load_backbone, load_merged
from models.definition import Definition, scoring_fields
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


def test_the_identity_sees_the_tokenizer_and_what_scores_depend_on_of_the_configuration(tmp_path: Path) -> None:
    tiny_backbone().save(tmp_path)
    definition = Definition.read(tmp_path)
    before = definition.identify("weights")
    assert definition.identify("others") != before

    def changed(name: str, **fields: object) -> str:
        content = json.dumps(json.loads(definition.files[name]) | fields).encode()
        return Definition({**definition.files, name: content}).identify("weights")

    assert changed("config.json", rope_parameters={"rope_type": "default", "rope_theta": 77.0}) != before
    assert changed("tokenizer.json", normalizer={"type": "Lowercase"}) != before
    assert changed("tokenizer_config.json", add_bos_token=True) != before
    assert changed("config.json", transformers_version="0", _name_or_path="/there", dtype="bfloat16") == before


def test_the_definition_of_a_backbone_is_written_alike_each_time_and_reads_text_as_its_source_does(
    tmp_path: Path,
) -> None:
    tiny_backbone().save(tmp_path)
    loaded = load_backbone(tmp_path)
    assert loaded.definition() == load_backbone(tmp_path).definition()
    assert scoring_fields(json.loads(loaded.definition().files["config.json"])) == scoring_fields(
        json.loads((tmp_path / "config.json").read_text())
    )
    loaded.definition().write(tmp_path / "again")
    assert load_backbone(tmp_path, definition=tmp_path / "again").encoder.fingerprint == loaded.encoder.fingerprint


def test_another_definition_takes_the_place_of_the_folders_own(tmp_path: Path) -> None:
    tiny_backbone().save(tmp_path)
    definition = Definition.read(tmp_path)
    config = json.loads(definition.files["config.json"]) | {"rms_norm_eps": 0.5}
    Definition({**definition.files, "config.json": json.dumps(config).encode()}).write(tmp_path / "other")
    assert load_backbone(tmp_path, definition=tmp_path / "other").causal_lm.config.rms_norm_eps == 0.5


def test_weights_that_lack_a_tensor_are_refused_by_its_name(tmp_path: Path) -> None:
    tiny_backbone().save(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"lack 1 tensors, among them model\.norm\.weight"):
        load_backbone(tmp_path)


def test_a_tokenizer_that_is_no_json_is_named(tmp_path: Path) -> None:
    tiny_backbone().save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BackboneError, match=r"tokenizer\.json: not a tokenizer"):
        load_backbone(tmp_path)


def test_what_cannot_be_loaded_is_named(tmp_path: Path, bundle: Bundle) -> None:
    with pytest.raises(BackboneError, match=str(tmp_path)):
        load_backbone(tmp_path)
    with pytest.raises(BackboneError, match="adapter"):
        tiny_backbone().load_lora(tmp_path)
