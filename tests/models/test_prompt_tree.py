import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.packs import Branch, Pack, room, split_pack
from models.projection import Projections
from models.prompt_tree import SlotVectors, TreeModel, lay_out
from models.scorer import score
from models.segments import Segment, SlotKind
from tests.tiny import D_COLLAB, D_HIDDEN, D_MODEL, tiny_backbone

BACKBONE = tiny_backbone()
MODEL = TreeModel(BACKBONE)
torch.manual_seed(5)
PROJECTIONS = Projections(D_COLLAB, D_HIDDEN, D_MODEL)
VOCABULARY = 400


def tokens(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist())


def slotted_pack(seed: int, trunk: int, lengths: list[int], prefix: int = 0) -> Pack:
    """A trunk with a user slot, branches with item and warm slots, the last attached halfway.

    The first `prefix` tokens of all trunks are the same.
    """
    slot = max(trunk // 3, min(prefix, trunk - 1))
    branches = [
        Branch(trunk, Segment(tokens(seed + 1 + i, n + 2), ((SlotKind.ITEM, 0), (SlotKind.WARM, 1))))
        for i, n in enumerate(lengths)
    ]
    branches[-1] = Branch(max(trunk // 2, slot + 1), branches[-1].segment)
    ids = tokens(0, prefix)[:trunk] + tokens(seed, trunk)[prefix:]
    return Pack(Segment(ids, ((SlotKind.USER, slot),)), tuple(branches))


def slot_vectors(seed: int, packs: int, branches: int) -> SlotVectors:
    torch.manual_seed(seed)
    return SlotVectors(torch.randn(packs, D_COLLAB), torch.randn(branches, D_COLLAB), torch.randn(branches, D_MODEL))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(
        st.tuples(st.integers(3, 40), st.lists(st.integers(1, 9), min_size=1, max_size=6)), min_size=1, max_size=4
    ),
    st.integers(0, 12),
)
def test_packed_equals_one_prompt_at_a_time(seed: int, shapes: list[tuple[int, list[int]]], prefix: int) -> None:
    packs = [slotted_pack(seed + 100 * i, trunk, lengths, prefix) for i, (trunk, lengths) in enumerate(shapes)]
    vectors = slot_vectors(seed, len(packs), sum(len(pack.branches) for pack in packs))
    with torch.no_grad():
        packed = MODEL.logits(lay_out(packs), PROJECTIONS, vectors).sigmoid()
    index = 0
    for row, pack in enumerate(packs):
        for branch in pack.branches:
            prompt = Segment(pack.trunk.token_ids[: branch.attach], pack.trunk.slots) + branch.segment
            alone = score(
                BACKBONE,
                prompt,
                PROJECTIONS,
                {
                    SlotKind.USER: vectors.user_UC[row],
                    SlotKind.ITEM: vectors.item_KC[index],
                    SlotKind.WARM: vectors.semantic_KD[index],
                },
            )
            assert abs(alone - float(packed[index])) < 1e-5
            index += 1


def test_packed_losses_and_gradients_equal_one_pair_at_a_time() -> None:
    packs = [slotted_pack(1, 21, [4, 7, 2]), slotted_pack(50, 9, [3, 3])]
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    vectors = slot_vectors(3, 2, 5)

    def gradients(batches: list[tuple[list[Pack], SlotVectors, torch.Tensor]]) -> tuple[float, list[torch.Tensor]]:
        leaves = [vectors.user_UC, vectors.item_KC, vectors.semantic_KD, *PROJECTIONS.parameters()]
        for leaf in leaves:
            leaf.requires_grad_(True).grad = None
        total = 0.0
        for group, part, wanted in batches:
            logits = MODEL.logits(lay_out(group), PROJECTIONS, part)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
            loss.backward()
            total += float(loss.detach())
        return total, [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]

    together = gradients([(packs, vectors, labels)])
    single = []
    index = 0
    for row, pack in enumerate(packs):
        for branch in pack.branches:
            one = slice(index, index + 1)
            part = SlotVectors(vectors.user_UC[row : row + 1], vectors.item_KC[one], vectors.semantic_KD[one])
            single.append(([Pack(pack.trunk, (branch,))], part, labels[one]))
            index += 1
    alone = gradients(single)
    assert abs(together[0] - alone[0]) < 1e-4
    assert len(together[1]) == len(alone[1]) == 3 + 6
    for ours, theirs in zip(together[1], alone[1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3)


def test_neighbours_and_order_do_not_change_a_score() -> None:
    first, second = slotted_pack(1, 30, [4, 5]), slotted_pack(2, 7, [1])
    vectors = slot_vectors(0, 2, 3)
    swapped = SlotVectors(vectors.user_UC.flip(0), vectors.item_KC[[2, 0, 1]], vectors.semantic_KD[[2, 0, 1]])
    with torch.no_grad():
        ours = MODEL.logits(lay_out([first, second]), PROJECTIONS, vectors)
        theirs = MODEL.logits(lay_out([second, first]), PROJECTIONS, swapped)
    torch.testing.assert_close(ours, theirs[[1, 2, 0]], atol=1e-5, rtol=0)


def test_what_all_prompts_begin_with_is_computed_once() -> None:
    packs = [slotted_pack(seed, 20, [3, 4], prefix=8) for seed in (1, 2, 3)]
    tree = lay_out(packs)
    assert tree.root == 8
    assert len(tree.token_ids_T) == sum(pack.tokens for pack in packs) - 2 * 8
    attached_early = Pack(packs[0].trunk, (Branch(5, packs[0].branches[0].segment),))
    assert lay_out([*packs, attached_early]).root == 5
    assert lay_out(packs[:1]).root == 0


def test_vectors_that_do_not_match_the_slots_are_refused() -> None:
    import pytest

    batch = lay_out([slotted_pack(1, 5, [2, 2])])
    with pytest.raises(ValueError, match="2 slots but 3 vectors"):
        MODEL.logits(batch, PROJECTIONS, slot_vectors(0, 1, 3))
    with pytest.raises(ValueError, match="no vectors were given"):
        MODEL.logits(batch)


def test_tokens_are_counted_packed_and_alone() -> None:
    pack = Pack(Segment(tokens(0, 10)), (Branch(10, Segment(tokens(1, 3))), Branch(5, Segment(tokens(2, 4)))))
    assert pack.tokens == 17 and pack.tokens_alone == 13 + 9


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 60))
def test_split_parts_cover_every_branch_once_and_fit(lengths: list[int], budget: int) -> None:
    pack = Pack(Segment(tokens(0, 10)), tuple(Branch(10, Segment((1,) * n)) for n in lengths))
    parts = list(split_pack(pack, budget))
    assert [index for _, where in parts for index in where] == list(range(len(lengths)))
    for part, where in parts:
        assert part.branches == pack.branches[where.start : where.stop]
        assert part.tokens <= room(10, budget) or len(part.branches) == 1
