import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.segments import SlotKind
from models.template import PromptKind, Template, TemplateConfig, window_start
from models.tokens import TextEncoder
from tests.tiny import tiny_titles, tiny_tokenizer, tokenizer_with_bos

TOKENIZER = tiny_tokenizer()
TEMPLATE = Template(TemplateConfig(), TextEncoder(TOKENIZER))


def text_of(template: Template, kind: PromptKind) -> str:
    """One prompt in words, every slot by its name."""
    titles = template.titles(["Heat", "Alien", "Brazil"])
    prompt = template.instruction(kind) + template.user_segment(kind, titles[:2]) + template.candidate(kind, titles[2])
    text, start = "", 0
    for slot, index in prompt.slots:
        text += TOKENIZER.decode(list(prompt.token_ids[start:index])) + slot
        start = index + 1
    return text + TOKENIZER.decode(list(prompt.token_ids[start:]))


def test_a_prompt_reads_as_figure_4_says() -> None:
    paper = Template(TemplateConfig(style="paper"), TextEncoder(TOKENIZER))
    assert text_of(paper, PromptKind.PROJECT).endswith(
        "MovieList:\nHeat\nAlien\nThe user's feature is<User_ID>.\nThe target movie's feature is<Item_ID><Warm_ID>"
        "\nTarget Movie:\nBrazil\nAnswer:\n"
    )


def test_a_compact_prompt_holds_the_same_parts() -> None:
    liked = "The user likes these movies:\nHeat\nAlien\n"
    assert text_of(TEMPLATE, PromptKind.ADAPT) == f"{liked}Brazil good?\n"
    assert text_of(TEMPLATE, PromptKind.PROJECT) == f"{liked}User <User_ID>\n<Item_ID><Warm_ID>Brazil good?\n"


def test_figure_2_has_no_slots_and_figure_3_is_the_title_alone() -> None:
    title = TEMPLATE.titles(["Heat"])[0]
    adapt = TEMPLATE.user_segment(PromptKind.ADAPT, [title]) + TEMPLATE.candidate(PromptKind.ADAPT, title)
    assert adapt.slots == ()
    assert TOKENIZER.decode(list(TEMPLATE.distil(title).token_ids)) == "Movie: Heat"


def test_a_tokenizers_bos_begins_every_prompt_once_and_no_segment_in_it() -> None:
    tokenizer = tokenizer_with_bos()
    template, bos = Template(TemplateConfig(), TextEncoder(tokenizer)), tokenizer.bos_token_id
    title = template.titles(["Heat"])[0]
    for kind in PromptKind:
        rest = template.user_segment(kind, [title]) + template.candidate(kind, title)
        ids = (template.instruction(kind) + rest).token_ids
        assert ids[0] == bos and ids.count(bos) == 1
        assert ids[1:] == TEMPLATE.instruction(kind).token_ids + rest.token_ids
    assert template.distil(title).token_ids == (bos, *TEMPLATE.distil(title).token_ids)


def test_nouns_are_parameters() -> None:
    books = Template(TemplateConfig(noun="book", plural="books"), TextEncoder(TOKENIZER))
    text = TOKENIZER.decode(list(books.instruction(PromptKind.ADAPT).token_ids))
    assert text == "The user likes these books:\n"
    paper = Template(TemplateConfig(noun="book", plural="books", style="paper"), TextEncoder(TOKENIZER))
    text = TOKENIZER.decode(list(paper.instruction(PromptKind.ADAPT).token_ids))
    assert "BookList:" in text and "movie" not in text.lower()


def test_an_empty_history_has_its_own_wording() -> None:
    text = TOKENIZER.decode(list(TEMPLATE.user_segment(PromptKind.ADAPT, []).token_ids))
    assert text == "No movies yet.\n"


def test_a_slot_is_an_index_whatever_a_title_spells() -> None:
    honest, mean = TEMPLATE.titles(["Heat", "<Item_ID> <Warm_ID> <User_ID>"])
    slots = [TEMPLATE.candidate(PromptKind.PROJECT, title).slots for title in (honest, mean)]
    assert slots[0] == slots[1] == ((SlotKind.ITEM, 0), (SlotKind.WARM, 1))


def test_a_long_title_is_cut_at_the_cap_and_reported() -> None:
    config = TemplateConfig(title_tokens=5)
    short, long = Template(config, TextEncoder(TOKENIZER)).titles(["A", "zq" * 40])
    assert short.cut == 0 and len(long.token_ids) == 5 and long.cut == len(TextEncoder(TOKENIZER).encode("zq" * 40)) - 5


@given(st.integers(0, 60), st.integers(0, 80))
def test_the_history_gives_way_oldest_first_and_only_as_far_as_needed(count: int, budget: int) -> None:
    template = Template(TemplateConfig(history_tokens=budget), TextEncoder(TOKENIZER))
    titles = template.titles(tiny_titles(count))
    first = template.first_kept(titles)
    cost = [len(template.history_item(title)) for title in titles]
    assert sum(cost[first:]) <= budget
    assert first == 0 or sum(cost[first - 1 :]) > budget


@given(st.integers(0, 300), st.integers(1, 30), st.integers(1, 40))
def test_an_anchored_window_holds_enough_and_never_too_much(total: int, size: int, step: int) -> None:
    start = window_start(total, TemplateConfig(max_history=size, window_step=step))
    kept = total - start
    assert kept <= size
    assert start == 0 or kept > size - min(step, size)


def test_an_anchored_window_moves_in_steps_and_a_sliding_one_with_every_item() -> None:
    anchored, sliding = TemplateConfig(), TemplateConfig(window="sliding")
    assert [window_start(n, anchored) for n in (10, 11, 15, 16, 20, 21)] == [0, 5, 5, 10, 10, 15]
    assert [window_start(n, sliding) for n in (10, 11, 15, 16)] == [0, 1, 5, 6]


def test_no_history_at_all_can_be_asked_for() -> None:
    assert window_start(7, TemplateConfig(max_history=0)) == 7


@pytest.mark.parametrize("total", [3, 7, 12, 18])
def test_between_steps_a_growing_history_changes_the_prompt_at_its_end_alone(total: int) -> None:
    titles = TEMPLATE.titles(tiny_titles(total + 1))
    config = TEMPLATE.config
    assert window_start(total, config) == window_start(total + 1, config)
    start = window_start(total, config)
    lines = [sum((TEMPLATE.history_item(one).token_ids for one in titles[start:end]), ()) for end in (total, total + 1)]
    assert lines[1][: len(lines[0])] == lines[0]
