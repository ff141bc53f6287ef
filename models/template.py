"""The prompt as data: a template compiles to token segments with slots (Figs. 2-4 of the paper).

A prompt is three segments. The **instruction** is constant. The **user segment** is the history and the words up to
the candidate. The **candidate segment** is everything that depends on the candidate, and comes last, so that many
candidates can share one pass over what precedes them. Each segment is tokenized alone and the prompt is the
concatenation of their ids, in training and in serving alike. The instruction begins with the tokens that the tokenizer
puts before a text, such as a BOS token.

There are two styles. `paper` has the words of the paper's figures. `compact`, the default, says the same in a fifth of
the words: a small language model learns more in the same number of steps (docs/results.md), and a step costs less.

Deviations from the figures: list entries and titles stand on lines of their own, so that a title has the same tokens in
the history and as the target; an answer cue ending in a newline follows, so that Yes and No carry no leading space.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from models.segments import Segment, SlotKind
from models.tokens import TextEncoder


class PromptKind(StrEnum):
    """Which figure of the paper a prompt follows."""

    ADAPT = "adapt"  # Fig. 2: text alone, stage 1
    PROJECT = "project"  # Fig. 4: with the three slots, stage 3 and serving


class TemplateConfig(BaseModel):
    """What a template depends on; part of the bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    noun: str = Field("movie", min_length=1, max_length=40, description="what an item is called")
    plural: str = Field("movies", min_length=1, max_length=40, description="the plural of the noun")
    style: Literal["compact", "paper"] = Field("compact", description="paper: the words of the paper's figures")
    max_history: int = Field(10, ge=0, le=200, description="the paper's window: the last ten liked items")
    window: Literal["sliding", "anchored"] = Field(
        "anchored",
        description="anchored: the window's start moves in steps, so prompts grow only at their end",
    )
    window_step: int = Field(
        5,
        ge=1,
        description="how many items an anchored window drops at once; half the window keeps 6 to 10 of 10",
    )
    title_tokens: int = Field(48, ge=1, description="cap of one title; ML-1M's longest is 30 in Qwen2's vocabulary")
    history_tokens: int = Field(512, ge=0, description="limit of the history; the oldest titles are left out")


@dataclass(frozen=True, slots=True)
class Title:
    """A title's token ids under the cap, and how many tokens the cap cut off."""

    token_ids: tuple[int, ...]
    cut: int = 0


def window_start(total: int, config: TemplateConfig) -> int:
    """Return the index of the first history item in the window, for a history of `total` items.

    Sliding keeps the last `max_history`. Anchored keeps at most as many, but its start is a multiple of
    `window_step`: between steps a growing history changes the prompt at its end alone.
    """
    surplus = max(0, total - config.max_history)
    if config.window == "sliding" or config.max_history == 0:
        return surplus
    step = min(config.window_step, config.max_history)
    return -(-surplus // step) * step


@dataclass(frozen=True, slots=True)
class PromptWords:
    """The constant words of a prompt, with slots by their names; the history and the title go between them."""

    instruction: str
    user_tail: str
    candidate: str
    cue: str


_SLOTS = re.compile("(" + "|".join(re.escape(kind) for kind in SlotKind) + ")")


def _capital(noun: str) -> str:
    return f"{noun[:1].upper()}{noun[1:]}"


def _compact_words(config: TemplateConfig) -> dict[PromptKind, PromptWords]:
    instruction, cue = f"The user likes these {config.plural}:\n", " good?\n"
    return {
        PromptKind.ADAPT: PromptWords(instruction, "", "", cue),
        PromptKind.PROJECT: PromptWords(instruction, f"User {SlotKind.USER}\n", f"{SlotKind.ITEM}{SlotKind.WARM}", cue),
    }


def _paper_words(config: TemplateConfig) -> dict[PromptKind, PromptWords]:
    noun, plural, target = config.noun, config.plural, f"Target {_capital(config.noun)}"
    given = f"A user has given high ratings to the following {plural}. Given the {noun} list"
    ask = f"whether the user would like the target {noun} by answering 'Yes.' or 'No.'\n{_capital(noun)}List:\n"
    cue = "\nAnswer:\n"
    return {
        PromptKind.ADAPT: PromptWords(
            f"{given} and a target {noun}'s title. Please identify {ask}", "", f"{target}:\n", cue
        ),
        PromptKind.PROJECT: PromptWords(
            f"{given}, the user's feature and a target {noun}'s feature and title. Please use all available information"
            f" to identify {ask}",
            f"The user's feature is{SlotKind.USER}.\nThe target {noun}'s feature is",
            f"{SlotKind.ITEM}{SlotKind.WARM}\n{target}:\n",
            cue,
        ),
    }


def prompt_words(config: TemplateConfig) -> list[str]:
    """Return all constant words of both prompts without slots, to train a tokenizer on them."""
    words = _paper_words(config) if config.style == "paper" else _compact_words(config)
    return [
        _SLOTS.sub("", part)
        for one in words.values()
        for part in (one.instruction, one.user_tail, one.candidate, one.cue)
        if part
    ]


class Template:
    """A `TemplateConfig` compiled with one tokenizer."""

    def __init__(self, config: TemplateConfig, encoder: TextEncoder) -> None:
        self.config = config
        self._encoder = encoder
        self._newline = self._words("\n")
        words = _paper_words(config) if config.style == "paper" else _compact_words(config)
        slot = {f"{kind}": Segment((0,), ((kind, 0),)) for kind in SlotKind}

        def compiled(text: str) -> Segment:
            segment = Segment(())
            for piece in _SLOTS.split(text):
                segment = segment + (slot[piece] if piece in slot else self._words(piece) if piece else Segment(()))
            return segment

        lead = Segment(encoder.lead)
        self._instructions = {kind: lead + compiled(one.instruction) for kind, one in words.items()}
        self._no_history = self._words(f"No {config.plural} yet.\n")
        self._user_tails = {kind: compiled(one.user_tail) for kind, one in words.items()}
        self._candidate_heads = {kind: compiled(one.candidate) for kind, one in words.items()}
        self._answer_cues = {kind: compiled(one.cue) for kind, one in words.items()}
        self._distil_head = lead + self._words(f"{_capital(config.noun)}: ")

    def instruction(self, kind: PromptKind) -> Segment:
        """Return the constant first segment."""
        return self._instructions[kind]

    def history_item(self, title: Title) -> Segment:
        """Return one line of the history."""
        return Segment(title.token_ids) + self._newline

    def user_tail(self, kind: PromptKind, *, empty_history: bool) -> Segment:
        """Return what follows the history in the user segment; an empty history has its own wording."""
        tail = self._user_tails[kind]
        return self._no_history + tail if empty_history else tail

    def candidate(self, kind: PromptKind, title: Title) -> Segment:
        """Return the candidate segment: slots, title, answer cue."""
        return self._candidate_heads[kind] + Segment(title.token_ids) + self._answer_cues[kind]

    def distil(self, title: Title) -> Segment:
        """Return Fig. 3's prompt; its last hidden state is the item's semantic vector."""
        return self._distil_head + Segment(title.token_ids)

    def titles(self, texts: Sequence[str]) -> list[Title]:
        """Tokenize titles, each alone, cut to the cap."""
        cap = self.config.title_tokens
        return [Title(tuple(ids[:cap]), max(0, len(ids) - cap)) for ids in self._encoder.encode_many(list(texts))]

    def first_kept(self, titles: Sequence[Title]) -> int:
        """Return how many of a window's oldest titles give way to the history's token budget."""
        left = self.config.history_tokens
        for index in range(len(titles) - 1, -1, -1):
            left -= len(titles[index].token_ids) + len(self._newline)
            if left < 0:
                return index + 1
        return 0

    def user_segment(self, kind: PromptKind, titles: Sequence[Title]) -> Segment:
        """Return the user segment for a window's titles, oldest first, already within the budget."""
        segment = Segment(())
        for title in titles:
            segment = segment + self.history_item(title)
        return segment + self.user_tail(kind, empty_history=not titles)

    def _words(self, text: str) -> Segment:
        return Segment(tuple(self._encoder.encode(text)))
