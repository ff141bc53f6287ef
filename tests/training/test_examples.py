import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.packs import Branch, Pack
from models.segments import Segment
from models.template import PromptKind, Template, TemplateConfig
from models.tokens import TextEncoder
from tests.tiny import tiny_titles, tiny_tokenizer
from training.data.dataset import Dataset
from training.data.history import build_histories
from training.examples import Examples, RowsByItem, forwards, rows_of, shuffled_steps
from training.studies import tokens_per_target

ENCODER = TextEncoder(tiny_tokenizer())
TITLES = [title * (1 + row % 3) for row, title in enumerate(tiny_titles(12))]  # of one, two and three lengths

templates = st.builds(
    TemplateConfig,
    max_history=st.integers(0, 7),
    window=st.sampled_from(["sliding", "anchored"]),
    window_step=st.integers(1, 9),
    title_tokens=st.sampled_from([1, 6, 48]),
    history_tokens=st.sampled_from([0, 7, 40, 90, 512]),
)


def random_dataset(seed: int, rows: int = 80) -> Dataset:
    """Four users over twelve items, timestamps with ties; the last user likes nothing."""
    rng = np.random.default_rng(seed)
    splits = {}
    for name, size in {"train": rows, "valid": rows // 3}.items():
        users = rng.integers(0, 4, size)
        splits[name] = pl.DataFrame(
            {
                "user_id": [f"u{user}" for user in users],
                "item_id": [f"i{item}" for item in rng.integers(0, len(TITLES), size)],
                "label": ((rng.random(size) < 0.6) & (users < 3)).astype(np.int8),
                "timestamp": rng.integers(0, 40, size),
                "weight": np.ones(size, np.float32),
            }
        )
    return Dataset(pl.DataFrame({"item_id": [f"i{row}" for row in range(len(TITLES))], "title": TITLES}), splits)


def liked_before(dataset: Dataset, split: str, row: int) -> list[str]:
    """Return the titles that a row's user liked earlier, straight from the definition."""
    titles = dict(zip(dataset.items["item_id"], dataset.items["title"], strict=True))
    own = dataset.splits[split].row(row, named=True)
    liked = []
    for name in ("train", "valid") if split == "valid" else ("train",):
        frame = dataset.splits[name].with_row_index("row").sort("timestamp", "row")
        for one in frame.iter_rows(named=True):
            if one["user_id"] != own["user_id"] or one["label"] == 0:
                continue
            if one["timestamp"] >= own["timestamp"]:
                return liked
            liked.append(titles[one["item_id"]])
    return liked


def prompt_alone(template: Template, kind: PromptKind, liked: list[str], candidate: str) -> Segment:
    """Return one target's prompt as the template puts it together, with the window's rules written out."""
    config = template.config
    start = max(0, len(liked) - config.max_history)
    if config.window == "anchored" and config.max_history:
        step = min(config.window_step, config.max_history)
        while start % step:
            start += 1
    titles = template.titles(liked[start:])
    while sum(len(title.token_ids) + len(ENCODER.encode("\n")) for title in titles) > config.history_tokens:
        titles = titles[1:]
    return (
        template.instruction(kind)
        + template.user_segment(kind, titles)
        + template.candidate(kind, template.titles([candidate])[0])
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    templates,
    st.integers(1, 9),
    st.sampled_from(PromptKind),
    st.sampled_from(["train", "valid"]),
)
def test_what_a_packed_target_sees_is_its_prompt_alone(
    seed: int, config: TemplateConfig, max_targets: int, kind: PromptKind, split: str
) -> None:
    dataset, template = random_dataset(seed), Template(config, ENCODER)
    examples = Examples(dataset, build_histories(dataset), template)
    targets = examples.targets(split, max_targets)
    candidates = dataset.splits[split]["item_id"].to_list()
    for rows in targets.groups:
        pack = examples.pack(kind, targets, rows)
        assert len(pack.branches) == len(rows) <= max_targets
        assert pack.trunk.slots == ()
        for row, branch in zip(rows, pack.branches, strict=True):
            seen = Segment(pack.trunk.token_ids[: branch.attach]) + branch.segment
            title = TITLES[int(candidates[row][1:])]
            assert seen == prompt_alone(template, kind, liked_before(dataset, split, int(row)), title)


@settings(max_examples=30, deadline=None)
@given(templates, st.lists(st.integers(0, len(TITLES) - 1), min_size=1, unique=True))
def test_a_title_without_a_history_has_the_prompt_of_a_user_who_likes_nothing(
    config: TemplateConfig, items: list[int]
) -> None:
    dataset, template = random_dataset(0), Template(config, ENCODER)
    pack = Examples(dataset, build_histories(dataset), template).title_pack(np.array(items, np.int32))
    seen = [Segment(pack.trunk.token_ids[: one.attach]) + one.segment for one in pack.branches]
    assert seen == [prompt_alone(template, PromptKind.ADAPT, [], TITLES[item]) for item in items]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 20), st.integers(1, 15))
def test_titles_are_dealt_in_whole_passes_and_bring_all_their_rows(seed: int, size: int, steps: int) -> None:
    dataset = random_dataset(seed, rows=20)
    examples = Examples(dataset, build_histories(dataset), Template(TemplateConfig(), ENCODER))
    targets = examples.targets("train", 16)
    by_item = RowsByItem(targets)
    assert by_item.items.tolist() == sorted(set(targets.item_B.tolist()))
    dealt = by_item.dealt(steps, size, np.random.default_rng(seed))
    assert len(dealt) == steps
    per_pass = len(by_item.items) // max(1, min(size, len(by_item.items)))
    for first in range(0, steps, per_pass):
        chosen = np.concatenate(dealt[first : first + per_pass])
        assert len(set(chosen.tolist())) == len(chosen)
    for items in dealt:
        assert len(items) == min(size, len(by_item.items))
        if len(items):
            rows, places = by_item.of(items)
            assert items[places].tolist() == targets.item_B[rows].tolist()
            assert sorted(rows.tolist()) == np.flatnonzero(np.isin(targets.item_B, items)).tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), templates, st.integers(1, 9))
def test_every_row_is_in_exactly_one_group_of_one_user(seed: int, config: TemplateConfig, max_targets: int) -> None:
    dataset = random_dataset(seed)
    examples = Examples(dataset, build_histories(dataset), Template(config, ENCODER))
    for split, frame in dataset.splits.items():
        targets = examples.targets(split, max_targets)
        assert sorted(np.concatenate(targets.groups)) == list(range(frame.height))
        assert all(frame["user_id"][rows.tolist()].n_unique() == 1 for rows in targets.groups)
        assert targets.label_B.tolist() == frame["label"].to_list()


def test_the_trunk_ends_with_the_last_history_that_needs_it() -> None:
    dataset = random_dataset(0)
    examples = Examples(dataset, build_histories(dataset), Template(TemplateConfig(), ENCODER))
    targets = examples.targets("train", 16)
    for rows in targets.groups:
        pack = examples.pack(PromptKind.PROJECT, targets, rows)
        assert len(pack.trunk) == max(branch.attach for branch in pack.branches)


def test_packing_saves_tokens_and_anchored_windows_save_more() -> None:
    dataset = random_dataset(0, rows=400)
    saved = {}
    for window in ("sliding", "anchored"):
        template = Template(TemplateConfig.model_validate({"window": window}), ENCODER)
        examples = Examples(dataset, build_histories(dataset), template)
        packed, alone = tokens_per_target(examples, examples.targets("train", 16), PromptKind.PROJECT)
        assert packed < alone
        saved[window] = packed / alone
    assert saved["anchored"] < 0.8 * saved["sliding"]


def test_tokens_per_target_are_those_of_the_prompts() -> None:
    dataset = random_dataset(3)
    template = Template(TemplateConfig(), ENCODER)
    examples = Examples(dataset, build_histories(dataset), template)
    prompts = [
        prompt_alone(template, PromptKind.ADAPT, liked_before(dataset, "train", row), TITLES[int(item[1:])])
        for row, item in enumerate(dataset.splits["train"]["item_id"])
    ]
    _, alone = tokens_per_target(examples, examples.targets("train", 16), PromptKind.ADAPT)
    assert alone == pytest.approx(np.mean([len(prompt) for prompt in prompts]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 50))
def test_an_epoch_deals_every_group_once_into_steps_of_the_asked_size(seed: int, batch_targets: int) -> None:
    dataset = random_dataset(1)
    examples = Examples(dataset, build_histories(dataset), Template(TemplateConfig(), ENCODER))
    targets = examples.targets("train", 4)
    steps = shuffled_steps(targets, batch_targets, np.random.default_rng(seed))
    dealt = [tuple(rows) for groups in steps for rows in groups]
    assert sorted(dealt) == sorted(tuple(rows) for rows in targets.groups)
    sizes = [sum(map(len, groups)) for groups in steps]
    assert all(batch_targets <= size < batch_targets + 4 for size in sizes[:-1])
    again = shuffled_steps(targets, batch_targets, np.random.default_rng(seed))
    assert dealt == [tuple(rows) for groups in again for rows in groups]


def test_epochs_differ_in_their_order() -> None:
    dataset = random_dataset(1)
    targets = Examples(dataset, build_histories(dataset), Template(TemplateConfig(), ENCODER)).targets("train", 4)
    first, second = (shuffled_steps(targets, 8, np.random.default_rng(seed)) for seed in (0, 1))
    assert [tuple(rows) for rows in first[0]] != [tuple(rows) for rows in second[0]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 200))
def test_a_forward_stays_under_its_budget_in_tokens(lengths: list[int], budget: int) -> None:
    packs = [
        (Pack(Segment((0,)), (Branch(1, Segment((0,) * length)),)), np.array([row], np.int32))
        for row, length in enumerate(lengths)
    ]
    batches = list(forwards(packs, budget))
    assert sorted(np.concatenate([rows_of(batch) for batch in batches])) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(pack.tokens for pack, _ in batch) <= budget
        assert [len(pack.branches[0].segment) for pack, _ in batch] == [lengths[row] for row in rows_of(batch)]


def test_a_limit_keeps_whole_groups_from_all_over_the_split() -> None:
    dataset = random_dataset(2, rows=400)
    targets = Examples(dataset, build_histories(dataset), Template(TemplateConfig(), ENCODER)).targets("train", 4)
    limited = targets.limited(100)
    whole = {tuple(rows) for rows in targets.groups}
    kept = [tuple(rows) for rows in limited.groups]
    assert set(kept) <= whole and len(set(kept)) == len(kept)
    assert 60 <= sum(map(len, kept)) <= 140
    assert {int(targets.user_B[rows[0]]) for rows in kept} == set(range(4))
    assert targets.limited(400) is targets


def test_rows_that_are_not_kept_leave_their_groups() -> None:
    dataset = random_dataset(2)
    targets = Examples(dataset, build_histories(dataset), Template(TemplateConfig(), ENCODER)).targets("train", 4)
    kept_B = np.arange(len(targets)) % 3 == 0
    assert sorted(np.concatenate(targets.only(kept_B).groups)) == list(np.flatnonzero(kept_B))
