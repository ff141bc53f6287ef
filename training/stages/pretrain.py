"""Before stage 1, for the `tiny` backbone alone: a tokenizer and a small Qwen2, made from the training text.

The text is the catalogue's titles, the train users' lists of liked items and the template's own words; no label of a
target is in it. What comes out is a stand-in that lets the whole path run and be measured on a CPU, not a language
model with knowledge.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from models.backbone import Backbone, load_backbone
from models.projection import Verbatim
from models.prompt_tree import SlotVectors, TreeModel, lay_out
from models.template import PromptKind, Template, TemplateConfig
from training.config import TinyConfig
from training.data.dataset import Dataset
from training.data.history import Histories
from training.examples import Examples, Int32, Targets, forwards, rows_of
from training.loop import StageLoop, derived_seed
from training.run import Run

END = "<|endoftext|>"
HELD_OUT = 0.05  # share of the token blocks that are never trained on
HELD_OUT_GROUPS = 16  # groups of questions that decide which checkpoint is kept
READING_SLOPE = 2.0  # log-odds of Yes for each feature that says Yes: three of them are nearly sure


def train_tokenizer(dataset: Dataset, template: TemplateConfig, vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on titles and template words; any byte is representable, so nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    titles = dataset.items["title"].to_list()
    # The template's words recur in every prompt: repeated as often as there are titles, each word becomes one token.
    tokenizer.train_from_iterator([*titles, *_template_words(template) * len(titles)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=32768)


def pretrain(run: Run, dataset: Dataset, histories: Histories) -> Path:
    """Make, train and save the `tiny` backbone; returns its folder. Finished earlier, it is taken as it is."""
    folder = run.folder / "backbone"
    if (folder / "config.json").exists():
        return folder
    config = run.config.tiny
    tokenizer = train_tokenizer(dataset, run.config.template, config.vocabulary)
    torch.manual_seed(derived_seed(run.config.seed, "tiny"))
    model: Any = _new_model(config, tokenizer)
    backbone = Backbone(model.to(run.device), tokenizer)
    _train(run, backbone, Examples(dataset, histories, Template(run.config.template, backbone.encoder)))
    if run.is_main:
        scratch = run.folder / ".backbone.part"
        backbone.save(scratch)
        scratch.rename(folder)
    run.accelerator.wait_for_everyone()
    load_backbone(folder)  # what was saved must load: a tokenizer lost in saving would show in every later stage
    return folder


def _new_model(config: TinyConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=config.d_model,
            intermediate_size=config.d_inner,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.key_value_heads,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@dataclass(frozen=True)
class _Questions:
    """Prompts to be answered: train targets by the groups that share a history, and features for their slots."""

    groups: list[Int32]
    features_K3: Tensor  # 0 is the word No, 1 the word Yes, between them a mixture


@dataclass(frozen=True)
class _Tasks:
    """What the stand-in learns, both at once; no label is in it.

    **Text**: the next token, in titles and in lists of what a user liked. **Reading**, in Fig. 4's prompt: the slots
    hold the words Yes and No, or a mixture drawn at random, and the answer's log-odds are the sum of what they say. A
    grown language model reads a statement wherever it stands; trained on text alone, the stand-in hears the item beside
    its answer and not the user further up, and stage 3 finds no gradient to the user's vector.
    """

    run: Run
    backbone: Backbone
    model: TreeModel
    examples: Examples
    targets: Targets

    def draw(self, groups: int, rng: np.random.Generator) -> _Questions:
        """Draw questions on so many groups of train targets."""
        count = min(groups, len(self.targets.groups))
        chosen = [self.targets.groups[index] for index in rng.choice(len(self.targets.groups), count)]
        rows = sum(len(group) for group in chosen)
        return _Questions(chosen, torch.from_numpy(rng.random((rows, 3), dtype=np.float32)))

    def text(self, ids_BT: Tensor) -> Tensor:
        """Return the summed cross-entropy of the next tokens."""
        with torch.autocast(self.run.device.type, torch.bfloat16, enabled=self.run.config.autocast):
            logits = self.backbone.model(input_ids=ids_BT.to(self.run.device), use_cache=False).logits
        wanted = ids_BT[:, 1:].reshape(-1).to(self.run.device)
        return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), wanted, reduction="sum")

    def reading(self, questions: _Questions) -> Iterator[Tensor]:
        """Yield the summed divergence of the answers from what the slots say, in this process's share of forwards."""
        ends = np.cumsum([len(rows) for rows in questions.groups])
        places = np.split(np.arange(len(questions.features_K3), dtype=np.int32), ends[:-1])
        packs = [
            (self.examples.pack(PromptKind.PROJECT, self.targets, rows), place)
            for rows, place in zip(questions.groups, places, strict=True)
        ]
        for batch in self.run.share(list(forwards(packs, self.run.config.max_tokens))):
            features_K3 = questions.features_K3[rows_of(batch)].to(self.run.device)
            answers = torch.tensor([self.backbone.answers.no, self.backbone.answers.yes], device=self.run.device)
            tree = lay_out([pack for pack, _ in batch]).to(self.run.device)
            with torch.autocast(self.run.device.type, torch.bfloat16, enabled=self.run.config.autocast):
                words_2D = self.backbone.embed(answers)
                mixed_3KD = torch.lerp(words_2D[0], words_2D[1], features_K3.T[..., None])
                logits_K = self.model.logits(tree, Verbatim(), SlotVectors(*mixed_3KD.unbind(0)))
            yield _divergence(logits_K, READING_SLOPE * (2 * features_K3 - 1).sum(-1))


def _divergence(logits_K: Tensor, wanted_K: Tensor) -> Tensor:
    """Return the summed divergence of answers from wanted log-odds: answers drawn by them would add noise alone."""
    cross_entropy = nn.functional.binary_cross_entropy_with_logits
    wanted = wanted_K.sigmoid()
    return cross_entropy(logits_K, wanted, reduction="sum") - cross_entropy(wanted_K, wanted, reduction="sum")


def _train(run: Run, backbone: Backbone, examples: Examples) -> None:
    config = run.config.tiny
    blocks_NT = _token_blocks(run, examples, backbone.tokenizer.eos_token_id)
    held_out = max(1, int(len(blocks_NT) * HELD_OUT))
    valid_NT, train_NT = blocks_NT[:held_out], blocks_NT[held_out:]
    # Whether the slots are read changes late and at once: patience would end the stage before.
    schedule = config.schedule.model_copy(update={"patience": sys.maxsize})
    tasks = _Tasks(run, backbone, TreeModel(backbone), examples, examples.targets("train", run.config.max_targets))
    asked = tasks.draw(HELD_OUT_GROUPS, np.random.default_rng(derived_seed(run.config.seed, "questions")))

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        text = sum(float(tasks.text(part)) for part in valid_NT.split(schedule.batch_targets))
        reading = torch.tensor(sum(float(part) for part in tasks.reading(asked)), device=run.device)
        return {
            "log_likelihood": -text / valid_NT[:, 1:].numel(),
            "reading": -float(run.sum(reading)) / len(asked.features_K3),
        }

    def plan(rng: np.random.Generator) -> list[tuple[Tensor, _Questions]]:
        order = torch.from_numpy(rng.permutation(len(train_NT)))
        batches = train_NT[order].split(schedule.batch_targets)
        return [(ids_BT, tasks.draw(config.question_groups, rng)) for ids_BT in batches]

    parameters = dict(backbone.model.named_parameters())
    rates = [(parameters, 1.0, schedule.weight_decay)]
    # Small data is gone through so often that its text is overfitted before the slots are read: reading decides.
    loop = StageLoop(run, "pretrain", rates, schedule, plan, evaluate, "reading")
    if not loop.restore():
        for ids_BT, questions in loop.steps():
            if len(mine := run.share(ids_BT)):
                loop.backward(tasks.text(mine) / ids_BT[:, 1:].numel())
            for divergence in tasks.reading(questions):
                loop.backward(divergence / len(questions.features_K3))
    loop.keep_best()


def _token_blocks(run: Run, examples: Examples, end: int) -> Tensor:
    """Return shuffled text as blocks of equal length, (N, T): each title alone, and lists of liked items."""
    rng = np.random.default_rng(derived_seed(run.config.seed, "text"))
    template, titles = examples.template, examples.titles
    documents = [list(template.distil(title).token_ids) for title in titles]
    for liked in _liked_lists(examples, template.config.max_history or 1, rng):
        # One list in five follows an instruction: its words are learned soon, and are half of a prompt's tokens.
        kind = PromptKind.ADAPT if rng.random() < 0.5 else PromptKind.PROJECT
        tokens = list(template.instruction(kind).token_ids) if rng.random() < 0.2 else []
        documents.append(
            [*tokens, *(token for item in liked for token in template.history_item(titles[item]).token_ids)]
        )
    stream = [token for index in rng.permutation(len(documents)) for token in (*documents[index], end)]
    width = run.config.tiny.sequence_tokens
    stream.extend([end] * (-len(stream) % width))
    return torch.tensor(stream, dtype=torch.long).reshape(-1, width)


def _liked_lists(examples: Examples, size: int, rng: np.random.Generator) -> Iterator[Int32]:
    """Yield every train user's liked items in order, cut into lists of `size` from a random start.

    The lists do not overlap, so that what is held out has not been read elsewhere.
    """
    for user_id in examples.dataset.splits["train"]["user_id"].unique(maintain_order=True):
        liked = examples.histories.last(user_id, through="train")
        for start in range(-int(rng.integers(size)), len(liked), size):
            chunk = liked[max(0, start) : start + size]
            if len(chunk):
                yield chunk


def _template_words(config: TemplateConfig) -> list[str]:
    """Return the words a prompt is made of, and the answers as they follow the cue."""
    noun = config.noun[:1].upper() + config.noun[1:]
    return [
        f"A user has given high ratings to the following {config.plural}. Given the {config.noun} list, the user's"
        f" feature and a target {config.noun}'s feature and title. Please use all available information to identify"
        f" whether the user would like the target {config.noun} by answering 'Yes.' or 'No.'",
        f"{noun}List:\nThe user's feature is.\nThe target {config.noun}'s feature is\nTarget {noun}:\nAnswer:\nYes",
        f"No {config.plural} yet.\n{noun}: \nAnswer:\nNo",
    ]
