"""Tokenizing data text and the two answers."""

import hashlib
import json
from dataclasses import dataclass
from itertools import takewhile

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
    the post-processor are left out of a copy of the tokenizer. `lead` keeps the tokens that the post-processor
    puts before a text, usually a BOS token. A prompt begins with them once; its later segments do not have them.

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
        described = json.dumps(definition, sort_keys=True)
        self._plain = Tokenizer.from_str(described)
        self.lead = leading_ids(tokenizer)
        self.fingerprint = hashlib.sha256(f"{self.lead}{described}".encode()).hexdigest()  # equal ids for equal text

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


def leading_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Return the ids that a tokenizer puts before a text; Qwen2 and SmolLM2 have none."""
    encoded = tokenizer("A", return_special_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return tuple(token_id for token_id, special in takewhile(lambda pair: pair[1] == 1, pairs))
