"""Tokenizing data text and the two answers."""

import json
from dataclasses import dataclass

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast


class TokenizerError(ValueError):
    """A tokenizer that cannot serve; the message says which one and why."""


@dataclass(frozen=True, slots=True)
class AnswerTokens:
    """Token ids of the two answers, as they stand after a newline."""

    yes: int
    no: int


class TextEncoder:
    """Turns data text into token ids without the tokenizer's added vocabulary.

    A title that spells `<unk>`, `<User_ID>`, `<|im_end|>` or `<tool_call>` is plain text. `split_special_tokens`
    is not enough: it still maps added non-special tokens (`<tool_call>`) to one id. So the added vocabulary and
    the post-processor (which would add a leading BOS) are left out of a copy of the tokenizer.

    Raises:
        TokenizerError: the tokenizer has no fast implementation to copy.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TokenizerError(f"{type(tokenizer).__name__} is not a fast tokenizer; give one with tokenizer.json")
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
        definition["added_tokens"] = []
        definition["post_processor"] = None
        definition["truncation"] = None
        definition["padding"] = None
        self._plain = Tokenizer.from_str(json.dumps(definition))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of one text."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text; parallel inside the tokenizer."""
        return [list(one.ids) for one in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def answers(self) -> AnswerTokens:
        """Return the ids of "Yes" and "No".

        Raises:
            TokenizerError: an answer is not exactly one token.
        """
        return AnswerTokens(yes=self._single("Yes"), no=self._single("No"))

    def _single(self, word: str) -> int:
        ids = self.encode(word)
        if len(ids) != 1:
            raise TokenizerError(f"the answer {word!r} is {len(ids)} tokens here; a backbone needs it as one")
        return ids[0]
