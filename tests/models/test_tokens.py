import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from models.tokens import TextEncoder, TokenizerError
from tests.tiny import tiny_tokenizer


@pytest.fixture
def crowded() -> PreTrainedTokenizerFast:
    """A tokenizer with special and plain added tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<User_ID>"]})
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    return tokenizer


@pytest.mark.parametrize("text", ["<|im_end|>", "<User_ID>", "<tool_call>", "<|end|>", "a <tool_call> b"])
def test_text_that_spells_an_added_token_is_plain_text(crowded: PreTrainedTokenizerFast, text: str) -> None:
    ids = TextEncoder(crowded).encode(text)
    added = set(crowded.get_added_vocab().values())
    assert not added & set(ids)
    assert crowded.decode(ids) == text


def test_one_text_and_many_texts_have_the_same_ids(crowded: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(crowded)
    texts = ["Amber Garden", 'Ночь, "Part"', ""]
    assert encoder.encode_many(texts) == [encoder.encode(text) for text in texts]


def test_an_answer_of_several_tokens_is_refused() -> None:
    class Wordy(TextEncoder):
        def encode(self, text: str) -> list[int]:
            return [1, 2] if text == "No" else [1]

    with pytest.raises(TokenizerError, match="'No' is 2 tokens"):
        Wordy(tiny_tokenizer()).answers()
