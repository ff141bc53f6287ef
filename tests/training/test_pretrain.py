"""The stand-in backbone: its tokenizer keeps the answers whole, and its pre-training teaches it to read the slots."""

import itertools
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from models.backbone import Backbone, load_backbone
from models.packs import Branch, Pack
from models.projection import Verbatim
from models.prompt_tree import SlotVectors, TreeModel, lay_out
from models.segments import Segment
from models.template import PromptKind, Template
from tests.training.micro import MICRO
from training.config import Config
from training.data.dataset import Dataset
from training.data.history import build_histories
from training.run import Run
from training.stages.pretrain import pretrain

READING = {
    **MICRO["tiny"],
    "d_model": 64,
    "question_groups": 12,
    "schedule": {"epochs": 1, "learning_rate": 0.002, "batch_targets": 8, "min_steps": 150},
}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> tuple[Backbone, Config]:
    config = Config.changed_by({**MICRO, "tiny": READING})
    run = Run(tmp_path_factory.mktemp("pretrain"), config, Accelerator(cpu=True), Console(quiet=True))
    folder: Path = pretrain(run, dataset, build_histories(dataset))
    return load_backbone(folder), config


def test_yes_and_no_are_single_tokens_and_any_text_survives(pretrained: tuple[Backbone, Config]) -> None:
    backbone, _ = pretrained
    assert backbone.answers.yes != backbone.answers.no
    for text in ('L\'Été, "2nd" & more (1999)', "日本 <|endoftext|>"):
        assert backbone.tokenizer.decode(backbone.encoder.encode(text)) == text


def test_every_slot_moves_the_answer_the_way_its_word_says(
    pretrained: tuple[Backbone, Config], dataset: Dataset
) -> None:
    backbone, config = pretrained
    template = Template(config.template, backbone.encoder)
    words = backbone.embed(torch.tensor([backbone.answers.no, backbone.answers.yes])).detach()
    history, title = (
        template.titles(dataset.items["title"].to_list()[:4]),
        template.titles(["The Copper Lighthouse"])[0],
    )
    prompt = (
        template.instruction(PromptKind.PROJECT)
        + template.user_segment(PromptKind.PROJECT, history)
        + template.candidate(PromptKind.PROJECT, title)
    )
    features = torch.tensor(list(itertools.product((0, 1), repeat=3)))
    batch = lay_out([Pack(Segment(()), (Branch(0, prompt),))] * len(features))
    with torch.no_grad():
        logits = TreeModel(backbone).logits(batch, Verbatim(), SlotVectors(*words[features].unbind(1)))
    for slot, name in enumerate(("user", "item", "warm")):
        effect = logits[features[:, slot] == 1].mean() - logits[features[:, slot] == 0].mean()
        assert effect > 0.5, f"the {name}'s feature moves the answer by {float(effect):.3f}"
