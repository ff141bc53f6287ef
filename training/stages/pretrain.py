"""Before stage 1, for the `tiny` backbone alone: a tokenizer and a small Qwen2, made from the training text.

The text is the catalogue's titles, the train users' lists of liked items and the template's own words; no label of a
target is in it. What comes out is a stand-in that lets the whole path run and be measured on a CPU, not a language
model with knowledge.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from models.backbone import Backbone, load_backbone
from models.packed import Pack, SlotVectors, lay_out, packed_logits
from models.projection import Verbatim
from models.template import PromptKind, Template, TemplateConfig
from training.config import TinyConfig
from training.data.dataset import Dataset
from training.data.history import Histories
from training.examples import Examples, Int32, Targets, forwards, rows_of
from training.loop import StageLoop, derived_seed
from training.run import Run

END = "<|endoftext|>"
HELD_OUT = 0.05  # share of the token blocks that decide which checkpoint is kept
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
class _Step:
    """One step's text, and prompts to be read: groups of targets, and for each target three features and a coin."""

    ids_BT: Tensor
    groups: list[Int32]
    features_K3: Tensor  # 0 is the word No, 1 the word Yes, between them a mixture
    coins_K: Tensor


def _train(run: Run, backbone: Backbone, examples: Examples) -> None:
    """Next-token prediction over blocks of text, and reading features out of prompts of Fig. 4.

    A grown language model reads a statement wherever it stands in a prompt. The stand-in has to be taught to: trained
    on text alone it hears the item beside its answer and not the user further up, and stage 3 then finds no gradient
    to the user's vector. So the three slots hold the words Yes and No, or a mixture, and the answer's log-odds are the
    sum of what they say. The features are drawn at random; no label of the data is in it.
    """
    config = run.config.tiny
    schedule = config.schedule
    blocks_NT = _token_blocks(run, examples, backbone.tokenizer.eos_token_id)
    held_out = max(1, int(len(blocks_NT) * HELD_OUT))
    valid_NT, train_NT = blocks_NT[:held_out], blocks_NT[held_out:]
    targets = examples.targets("train", run.config.max_targets)

    def text_loss(ids_BT: Tensor) -> Tensor:
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.autocast):
            logits = backbone.model(input_ids=ids_BT.to(run.device), use_cache=False).logits
        wanted = ids_BT[:, 1:].reshape(-1).to(run.device)
        return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), wanted, reduction="sum")

    def reading_loss(packs: Sequence[tuple[Pack, Int32]], features_K3: Tensor, coins_K: Tensor) -> Tensor:
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.autocast):
            words_2D = backbone.embed(torch.tensor([backbone.answers.no, backbone.answers.yes], device=run.device))
            mixed_3KD = torch.lerp(words_2D[0], words_2D[1], features_K3.T[..., None].to(run.device))
            layout = lay_out([pack for pack, _ in packs]).to(run.device)
            logits_K = packed_logits(backbone, layout, Verbatim(), SlotVectors(*mixed_3KD.unbind(0)))
        log_odds_K = READING_SLOPE * (2 * features_K3 - 1).sum(-1)
        answers_K = (coins_K < log_odds_K.sigmoid()).float().to(run.device)
        return nn.functional.binary_cross_entropy_with_logits(logits_K, answers_K, reduction="sum")

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        total = sum(float(text_loss(part)) for part in valid_NT.split(schedule.batch_targets))
        return {"log_likelihood": -total / valid_NT[:, 1:].numel()}

    def plan(rng: np.random.Generator) -> list[_Step]:
        order = torch.from_numpy(rng.permutation(len(train_NT)))
        return [
            _step(ids_BT, targets, config.reading_groups, rng)
            for ids_BT in train_NT[order].split(schedule.batch_targets)
        ]

    parameters = dict(backbone.model.named_parameters())
    rates = [(parameters, 1.0, schedule.weight_decay)]
    loop = StageLoop(run, "pretrain", rates, schedule, plan, evaluate, "log_likelihood")
    if not loop.restore():
        for step in loop.steps():
            if len(mine := step.ids_BT[run.accelerator.process_index :: run.accelerator.num_processes]):
                loop.backward(text_loss(mine) / step.ids_BT[:, 1:].numel())
            places = np.split(np.arange(len(step.coins_K)), np.cumsum([len(rows) for rows in step.groups])[:-1])
            packs = [
                (examples.pack(PromptKind.PROJECT, targets, rows), place.astype(np.int32))
                for rows, place in zip(step.groups, places, strict=True)
            ]
            for batch in run.share(list(forwards(packs, run.config.max_tokens))):
                chosen = rows_of(batch)
                loop.backward(reading_loss(batch, step.features_K3[chosen], step.coins_K[chosen]) / len(step.coins_K))
    loop.keep_best()


def _step(ids_BT: Tensor, targets: Targets, groups: int, rng: np.random.Generator) -> _Step:
    chosen = [targets.groups[index] for index in rng.choice(len(targets.groups), min(groups, len(targets.groups)))]
    count = sum(len(rows) for rows in chosen)
    features_K3 = torch.from_numpy(rng.random((count, 3), dtype=np.float32))
    return _Step(ids_BT, chosen, features_K3, torch.from_numpy(rng.random(count, dtype=np.float32)))


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
