import json

import pytest
from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from models.tokens import TextEncoder, TokenizerError
from tests.tiny import tiny_tokenizer, tokenizer_with_bos


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


def test_what_begins_a_text_is_kept_apart_from_its_ids() -> None:
    tokenizer = tokenizer_with_bos()
    encoder = TextEncoder(tokenizer)
    assert encoder.lead == (tokenizer.bos_token_id,)
    assert [*encoder.lead, *encoder.encode("Amber Garden")] == tokenizer("Amber Garden").input_ids
    assert TextEncoder(tiny_tokenizer()).lead == ()


def test_an_end_token_and_padding_do_not_begin_a_text() -> None:
    tokenizer = tiny_tokenizer()
    end = ("<|end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", pair="$A $B <|end|>", special_tokens=[end]
    )
    tokenizer.backend_tokenizer.enable_padding(direction="left", length=40)
    assert TextEncoder(tokenizer).lead == ()


def test_the_fingerprint_sees_another_start_and_other_merges() -> None:
    plain, begun = TextEncoder(tiny_tokenizer()), TextEncoder(tokenizer_with_bos())
    assert plain.fingerprint == TextEncoder(tiny_tokenizer()).fingerprint != begun.fingerprint
    definition = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    definition["model"]["merges"].pop()
    fewer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(definition)))
    assert TextEncoder(fewer).fingerprint != plain.fingerprint
