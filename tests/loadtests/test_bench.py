import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from loadtests.bench.measure import Case, Measurer, matrix_seconds
from loadtests.bench.report import lines
from loadtests.bench.scorers import Naive, Packed, Reference
from loadtests.bench.shapes import MODELS, SHAPES, ModelShape, PromptShape, request
from loadtests.bench.weights import load, save
from models.backbone import Backbone, load_backbone
from models.probe import probe
from models.segments import Segment
from models.template import Template, TemplateConfig
from tests.tiny import tiny_tokenizer

SMALL = ModelShape("small", 64, 96, 2, 4, 2, 200, True, "float32")
SHORT = PromptShape("short", 20, 7, (5,))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save(SMALL, folder)
    return folder


def test_every_scorer_gives_the_same_scores(weights: Path) -> None:
    backbone, projections = load(SMALL, weights, "cpu")
    scorers = [kind(backbone, projections) for kind in (Reference, Naive, Packed)]
    for draw in range(3):
        group = request(SMALL, SHORT, 5, user=1, draw=draw)
        first, *others = (scorer.score(group) for scorer in scorers)
        assert first.std() > 0
        for other in others:
            np.testing.assert_allclose(other, first, atol=1e-5)


def test_the_naive_scorer_pads_unlike_lengths_rightly(weights: Path) -> None:
    backbone, projections = load(SMALL, weights, "cpu")
    group = request(SMALL, SHORT, 40, user=1, draw=0)
    branches = [
        replace(one, segment=Segment((one.segment.token_ids * 9)[: 2 + 7 * place % 50], one.segment.slots))
        for place, one in enumerate(group.pack.branches)
    ]
    unlike = replace(group, pack=replace(group.pack, branches=tuple(branches)))
    first, *others = (kind(backbone, projections).score(unlike) for kind in (Reference, Naive, Packed))
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-5)


def test_no_scorer_needs_a_special_token(weights: Path, tmp_path: Path) -> None:
    """GPT-2's and Pythia's tokenizers have no padding; this one has no special token at all."""
    _, projections = load(SMALL, weights, "cpu")
    fields = json.loads(tiny_tokenizer().backend_tokenizer.to_str()) | {"added_tokens": []}
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(fields)))
    assert not bare.all_special_tokens and bare.pad_token is None
    config = Qwen2Config(
        vocab_size=len(bare), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    made = Backbone(Qwen2ForCausalLM(config), bare)
    made.save(tmp_path / "bare")
    loaded = load_backbone(tmp_path / "bare")
    probe(loaded, Template(TemplateConfig(), loaded.encoder))
    small = replace(SMALL, vocabulary=len(bare))
    group = request(small, SHORT, 5, user=1, draw=0)
    first, *others = (kind(loaded, projections).score(group) for kind in (Reference, Naive, Packed))
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-5)


def test_tokens_are_those_computed(weights: Path) -> None:
    backbone, projections = load(SMALL, weights, "cpu")
    for kind, cold, warm in ((Reference, 5 * 27, 5 * 27), (Naive, 5 * 27, 5 * 27), (Packed, 20 + 35, 35)):
        measurer = Measurer(kind(backbone, projections), kind.__name__.lower(), SMALL, "cpu", seconds=0)
        assert measurer.measure(Case(SHORT, 5, "cold")).tokens_computed == cold
        assert measurer.measure(Case(SHORT, 5, "warm")).tokens_computed == warm


def test_requests_are_the_same_for_every_scorer_and_differ_between_users() -> None:
    one, again = (request(SMALL, SHORT, 5, user=1, draw=0) for _ in range(2))
    assert one.pack == again.pack and np.array_equal(one.item_KC, again.item_KC)
    assert request(SMALL, SHORT, 5, user=2, draw=0).pack.trunk != one.pack.trunk
    other_draw = request(SMALL, SHORT, 5, user=1, draw=1)
    assert other_draw.pack.trunk == one.pack.trunk and other_draw.pack.branches != one.pack.branches


def test_twice_the_tokens_take_the_products_longer() -> None:
    torch.set_num_threads(1)
    assert matrix_seconds(SMALL, 4000, "cpu") > matrix_seconds(SMALL, 1000, "cpu") > 0


def test_the_command_writes_the_documented_rows(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtests.bench", "--models", "tiny", "--scorers", "naive", "packed"]
    options = ["--shapes", "sglang", "--candidates", "2", "--seconds", "0", "--threads", "1", "--out", str(tmp_path)]
    shown = subprocess.run([*command, *options], capture_output=True, text=True, check=True).stdout
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert [(row["scorer"], row["user_cache"]) for row in rows] == [
        ("naive", "cold"),
        ("packed", "cold"),
        ("packed", "warm"),
    ]
    documented = {"model", "shape", "candidates", "scorer", "user_cache", "candidates_per_second", "p50_ms", "p99_ms"}
    for row in rows:
        assert documented | {"tokens_computed", "peak_memory_bytes"} <= row.keys()
        assert row["candidates_per_second"] > 0 and row["peak_memory_bytes"] > 10**7
    assert "x naive" in shown


def test_the_shapes_are_the_ones_that_are_compared() -> None:
    assert (SHAPES["sglang"].user_tokens, SHAPES["sglang"].candidate_tokens) == (120, 180)
    assert MODELS["qwen2-7b"].d_model == 3584 and MODELS["qwen2-0.5b"].layers == 24
    assert list(lines([]))
