import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.attention import OwnTokens
from models.packed import PackedModel, Part, Row
from models.packs import Branch, Pack, ScoringGroup
from models.projection import Projections
from models.scorer import score
from models.scoring_model import ScoringModel
from models.segments import Segment, SlotKind
from tests.tiny import D_COLLAB, D_HIDDEN, D_MODEL, tiny_backbone

BACKBONE = tiny_backbone()
torch.manual_seed(5)
PROJECTIONS = Projections(D_COLLAB, D_HIDDEN, D_MODEL)
VOCABULARY = 400
SOME = 6  # candidates of a group that are compared one by one; which ones differs from example to example


def model(cache_bytes: int = 2**20) -> ScoringModel:
    return ScoringModel(BACKBONE, PROJECTIONS, identity="test", cache_bytes=cache_bytes)


def group(seed: int, candidates: int, history: int, *, text: int | None = None) -> ScoringGroup:
    """A random user segment of `history` items and random candidates; equal `text`, equal token ids."""
    words = np.random.default_rng(seed if text is None else text)
    vectors = np.random.default_rng(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(words.integers(VOCABULARY, size=count).tolist())

    lengths = [3 + int(words.integers(1, 9)) for _ in range(history)]
    trunk = Segment(tokens(20 + sum(lengths) + 6), ((SlotKind.USER, 20 + sum(lengths)),))
    slots = ((SlotKind.ITEM, 0), (SlotKind.WARM, 1))
    branches = tuple(
        Branch(len(trunk), Segment(tokens(4 + int(words.integers(1, 20))), slots)) for _ in range(candidates)
    )
    return ScoringGroup(
        Pack(trunk, branches),
        vectors.normal(size=(1, D_COLLAB)).astype(np.float32),
        vectors.normal(size=(candidates, D_COLLAB)).astype(np.float32),
        vectors.normal(size=(candidates, D_MODEL)).astype(np.float32),
    )


def reference(group: ScoringGroup, candidate: int) -> float:
    vectors = {
        SlotKind.USER: torch.from_numpy(group.user_1C[0]),
        SlotKind.ITEM: torch.from_numpy(group.item_KC[candidate]),
        SlotKind.WARM: torch.from_numpy(group.semantic_KD[candidate]),
    }
    return score(BACKBONE, group.pack.trunk + group.pack.branches[candidate].segment, PROJECTIONS, vectors)


def assert_equals_reference(group: ScoringGroup, scores: np.ndarray, seed: int = 0) -> None:
    assert scores.shape == (len(group.pack.branches),)
    for candidate in np.random.default_rng(seed).permutation(len(scores))[:SOME].tolist():
        assert abs(reference(group, candidate) - float(scores[candidate])) < 1e-5


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 50)), min_size=1, max_size=3),
    st.sampled_from([0, 20_000, 2**22]),
    st.sampled_from([100, 700, 4096]),
)
def test_packed_equals_the_reference_cached_or_not_whatever_the_neighbours(
    seed: int, shapes: list[tuple[int, int]], cache_bytes: int, max_tokens: int
) -> None:
    groups = [group(seed + i, *shape) for i, shape in enumerate(shapes)]
    packed = model(cache_bytes)
    first = packed.score(groups, max_tokens)
    again = packed.score(groups[::-1], max_tokens)[::-1]
    for one, cold, warm in zip(groups, first, again, strict=True):
        assert_equals_reference(one, cold, seed)
        np.testing.assert_allclose(cold, warm, atol=1e-5)


def test_the_order_of_candidates_does_not_change_their_scores() -> None:
    one, packed = group(1, 40, 5), model()
    order = np.random.default_rng(0).permutation(40)
    mixed = replace(
        one,
        pack=Pack(one.pack.trunk, tuple(one.pack.branches[i] for i in order)),
        item_KC=one.item_KC[order],
        semantic_KD=one.semantic_KD[order],
    )
    [straight], [permuted] = packed.score([one]), packed.score([mixed])
    np.testing.assert_allclose(permuted, straight[order], atol=1e-5)


def test_users_of_equal_text_and_other_vectors_share_nothing() -> None:
    one, other = group(1, 8, 5, text=7), group(2, 8, 5, text=7)
    assert one.pack == other.pack
    packed = model()
    for _ in range(2):  # the second time from the cache
        for each, scores in zip((one, other), packed.score([one, other]), strict=True):
            assert_equals_reference(each, scores)


def test_equal_trunks_of_a_forward_are_computed_once() -> None:
    one = group(1, 8, 5)
    both = replace(one, item_KC=-one.item_KC)
    packed = model(cache_bytes=0)
    first, second = packed.score([one, both])
    assert_equals_reference(one, first)
    assert_equals_reference(both, second)
    assert packed.counts.tokens == one.pack.tokens + both.pack.tokens - len(one.pack.trunk)


def test_requests_of_one_user_fill_one_forward() -> None:
    one = group(1, 3, 20)
    packed = model(cache_bytes=0)
    packed.score([one] * 6, max_tokens=len(one.pack.trunk) + 7 * (one.pack.tokens - len(one.pack.trunk)))
    assert packed.counts.forwards == 1


def test_a_group_says_what_it_lacks() -> None:
    one = group(1, 3, 2)
    with pytest.raises(ValueError, match="item_KC: float32 of shape"):
        replace(one, item_KC=one.item_KC[:2])
    with pytest.raises(ValueError, match="need float32"):
        replace(one, user_1C=one.user_1C.astype(">f4"))


def test_a_long_list_computes_its_user_segment_once() -> None:
    one = group(1, 120, 20)
    packed = model()
    [scores] = packed.score([one], max_tokens=600)
    assert packed.counts.forwards > 3
    assert packed.counts.tokens == one.pack.tokens
    assert_equals_reference(one, scores)


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_a_budget_shorter_than_the_user_segment_makes_no_forward_for_each_candidate(cache_bytes: int) -> None:
    one, packed = group(1, 60, 20), model(cache_bytes)
    own = one.pack.tokens - len(one.pack.trunk)
    [scores] = packed.score([one], max_tokens=100)
    assert len(one.pack.trunk) > 100 and packed.counts.forwards <= own // 25
    assert_equals_reference(one, scores)


def stretched(one: ScoringGroup, lengths: list[int]) -> ScoringGroup:
    """The group with branches of these many tokens."""
    branches = []
    for branch, length in zip(one.pack.branches, lengths, strict=True):
        ids = (branch.segment.token_ids * length)[:length]
        branches.append(Branch(branch.attach, Segment(ids, branch.segment.slots)))
    return replace(one, pack=Pack(one.pack.trunk, tuple(branches)))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.sampled_from([2, 3, 4, 17, 60, 200]), min_size=1, max_size=60))
def test_branches_of_any_lengths_equal_the_reference(seed: int, lengths: list[int]) -> None:
    one = stretched(group(seed, len(lengths), 3), lengths)
    [scores] = model().score([one], max_tokens=10**5)
    assert_equals_reference(one, scores, seed)


def test_one_long_branch_does_not_pad_all_the_others() -> None:
    own = OwnTokens.of([16] * 999 + [60], 0, torch.device("cpu"))
    assert sum(one.places_NS.numel() for one in own.rectangles) == 999 * 16 + 60
    assert len(OwnTokens.of([12, 15, 20] * 30, 0, torch.device("cpu")).rectangles) == 1  # not worth a second one
    assert len(OwnTokens.of(list(range(8, 60)) * 40, 0, torch.device("cpu")).rectangles) < 10


def test_a_history_that_grew_is_extended_not_computed_again() -> None:
    grown = group(1, 4, 20)
    slot = grown.pack.trunk.slots[0][1]
    shorter = Segment(grown.pack.trunk.token_ids[: slot - 9] + grown.pack.trunk.token_ids[slot:])
    shorter = Segment(shorter.token_ids, ((SlotKind.USER, slot - 9),))
    branches = tuple(Branch(len(shorter), branch.segment) for branch in grown.pack.branches)
    packed = model()
    packed.score([replace(grown, pack=Pack(shorter, branches))])
    before = packed.counts.tokens
    [scores] = packed.score([grown])
    assert_equals_reference(grown, scores)
    new = 9 + len(grown.pack.trunk) - slot
    own = grown.pack.tokens - len(grown.pack.trunk)
    assert packed.counts.tokens - before < own + new + 16


def test_threads_that_share_a_model_get_their_own_scores() -> None:
    """Users of one text, scored at once through one small cache that evicts all the time."""
    groups = [group(seed, 5, 6, text=3) for seed in range(6)]
    expected = [[reference(one, i) for i in range(5)] for one in groups]
    packed = model(cache_bytes=60_000)
    worst = [1.0] * len(groups)

    def work(index: int) -> None:
        differences = [abs(packed.score([groups[index]])[0] - expected[index]).max() for _ in range(15)]
        worst[index] = max(differences)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(groups))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(worst) < 1e-5


def test_a_branch_inside_the_trunk_is_refused() -> None:
    one = group(1, 1, 2)
    early = replace(one, pack=Pack(one.pack.trunk, (Branch(3, one.pack.branches[0].segment),)))
    with pytest.raises(ValueError, match="attaches inside the trunk"):
        model().score([early])


def test_gradients_are_refused_not_silently_wrong() -> None:
    packed = PackedModel(BACKBONE)
    row = Row.of([Part(Segment((1, 2, 3)), (Segment((4, 5)),))], torch.device("cpu"))
    embeds = BACKBONE.embed(row.token_ids_T).clone().requires_grad_(True)
    with torch.enable_grad():
        inner = packed._decoder
        with pytest.raises(RuntimeError, match="gives no gradients"):
            inner(inputs_embeds=embeds[None], position_ids=row.position_ids_T[None], packed=row.layout)


def test_the_backbone_itself_is_left_as_it_was() -> None:
    before = BACKBONE.causal_lm.config._attn_implementation
    packed = PackedModel(BACKBONE)
    assert BACKBONE.causal_lm.config._attn_implementation == before
    ours = dict(BACKBONE.causal_lm.base_model.named_parameters())
    theirs = {name.replace("layers.1.layer.", "layers.1."): one for name, one in packed._decoder.named_parameters()}
    assert ours.keys() == theirs.keys()
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)
