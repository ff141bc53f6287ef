import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from models.features import Tables
from models.loading import Bundle
from tests.tiny import tiny_bundle
from tests.training.commands import refused, sella_train
from tests.training.micro import Trained
from training.evaluate import Scorer


def plain_score(folder: Path, described: dict[str, Any]) -> float:
    """Score a printed prompt by transformers and peft alone, as somebody without sella would."""
    backbone: Any = AutoModelForCausalLM.from_pretrained(folder / "backbone", dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(backbone, folder / "adapter").merge_and_unload().eval()
    with torch.no_grad():
        embeds = model.get_input_embeddings()(torch.tensor([described["token_ids"]])).clone()
        for slot in described["slots"]:
            embeds[0, slot["index"]] = torch.tensor(described["slot_vectors"][slot["kind"]])
        shares = model(inputs_embeds=embeds).logits[0, -1].softmax(-1)
    yes, no = float(shares[described["yes_id"]]), float(shares[described["no_id"]])
    return yes / (yes + no)


def asked(tables: Tables) -> list[tuple[str, ...]]:
    """Questions of every kind: trained, cold and unknown users and items, a history given, a title given."""
    users, items = tables.user_ids, tables.item_ids
    cold_user = users[list(tables.user_trained_U).index(False)]
    cold_item = items[list(tables.item_trained_I).index(False)]
    return [
        ("--user", users[0], "--item", items[0]),
        ("--user", cold_user, "--item", cold_item),
        ("--user", "nobody", "--item", items[1]),
        ("--user", users[1], "--item", "new", "--title", "Said <|im_end|> and <User_ID>"),
        ("--user", users[2], "--item", items[3], "--history", ",".join(items[4:20])),
        ("--user", users[2], "--item", items[3], "--history", ""),
    ]


@pytest.fixture(scope="module")
def random_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose adapter is far from zero: a micro run may keep the adapter it started with."""
    return tiny_bundle(tmp_path_factory.mktemp("random") / "bundle")


@pytest.mark.parametrize("which", ["bundle", "random_bundle"])
def test_plain_transformers_code_gives_the_score_of_the_printed_prompt(
    request: pytest.FixtureRequest, which: str
) -> None:
    bundle: Bundle = request.getfixturevalue(which)
    scores = []
    for question in asked(bundle.tables()):
        result = sella_train("prompt", "--bundle", bundle.folder, *question, "--json", "--vectors")
        assert result.exit_code == 0, result.output
        described = json.loads(result.stdout)
        assert [slot["kind"] for slot in described["slots"]] == ["<User_ID>", "<Item_ID>", "<Warm_ID>"]
        assert plain_score(bundle.folder, described) == pytest.approx(described["raw_score"], abs=1e-5)
        scores.append(described["raw_score"])
    assert len(set(scores)) == len(scores)


def test_the_plain_score_does_depend_on_the_printed_vectors(trained: Trained, scorer: Scorer) -> None:
    result = sella_train("prompt", "--bundle", trained.bundle, *asked(scorer.tables)[0], "--json", "--vectors")
    described = json.loads(result.stdout)
    for vector in described["slot_vectors"].values():
        vector[:] = [-one for one in vector]
    assert abs(plain_score(trained.bundle, described) - described["raw_score"]) > 1e-4


def test_a_printed_prompt_says_what_it_is_made_of(bundle: Bundle, scorer: Scorer) -> None:
    items = scorer.tables.item_ids
    question = ("--user", scorer.tables.user_ids[0], "--item", items[0], "--history", ",".join(items[1:13]))
    described = json.loads(sella_train("prompt", "--bundle", bundle.folder, *question, "--json").stdout)
    assert described["bundle_id"] == bundle.id
    assert "slot_vectors" not in described
    history = described["history"]
    assert history["given"] == 12 and history["used"] + history["dropped"] == 12 and 0 < history["used"] <= 10
    assert described["text"].endswith(f"<Item_ID><Warm_ID>{scorer.tables.titles[0]} good?\n")
    shown = [title for title in scorer.tables.titles[1:13] if f"\n{title}\n" in described["text"]]
    assert shown == list(scorer.tables.titles[13 - history["used"] : 13])
    for slot in described["slots"]:
        assert slot["kind"] in described["text"]
    readable = sella_train("prompt", "--bundle", bundle.folder, *question).stdout
    assert readable.endswith(described["text"] + "\n")
    assert " ".join(map(str, described["token_ids"])) in readable
    logit = sum(described["parts"].values())
    assert 1 / (1 + math.exp(-logit)) == pytest.approx(described["score"], abs=1e-6)
    assert f"lm {described['parts']['lm']:+.4f}" in readable


def test_a_prompt_about_an_unknown_item_without_a_title_is_refused(trained: Trained) -> None:
    line = refused("prompt", "--bundle", trained.bundle, "--user", "u01", "--item", "gone")
    assert "'gone' is not in the bundle's catalogue" in line and "--title" in line
