import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.prefix_cache import CHUNK_TOKENS, PrefixCache, chunk_names
from models.segments import Segment, SlotKind

USER = b"a vector"


def trunk(*ids: int, slot: int | None = None) -> Segment:
    return Segment(ids, () if slot is None else ((SlotKind.USER, slot),))


def names(segment: Segment, vector: bytes = USER, identity: str = "weights float32") -> list[bytes]:
    return chunk_names(identity, segment, [vector] * len(segment.slots))


def filled(tokens: int, value: float = 1.0) -> torch.Tensor:
    return torch.full((2, 2, 1, tokens, 4), value)


def test_a_beginning_is_named_alike_until_it_differs() -> None:
    long = trunk(*range(40), slot=35)
    assert len(names(long)) == 3
    assert names(long)[:2] == names(trunk(*range(32), 99, slot=32))[:2]
    assert names(long)[2] != names(long, b"another vector")[2]
    assert names(long)[:2] == names(long, b"another vector")[:2]
    assert set(names(long)).isdisjoint(names(long, identity="other weights"))
    assert names(trunk(5, *range(1, 40)))[2] != names(trunk(*range(40)))[2]


def test_a_slot_is_not_the_token_that_stands_in_its_place() -> None:
    ids = (0, 1, 2)
    assert len({names(trunk(*ids))[0], names(trunk(*ids, slot=0))[0], names(trunk(*ids, slot=1))[0]}) == 3


def test_a_kept_trunk_is_found_whole_and_a_longer_one_in_part() -> None:
    cache = PrefixCache(10**6)
    kept = trunk(*range(40))
    assert cache.find(names(kept), 40) is None
    computed = torch.randn(2, 2, 1, 40, 4)
    cache.keep(names(kept), 0, computed)
    found = cache.find(names(kept), 40)
    assert found is not None and torch.equal(found, computed)
    part = cache.find(names(trunk(*range(60))), 60)
    assert part is not None and torch.equal(part, computed[:, :, :, :32])
    cache.keep(names(trunk(*range(60))), 32, torch.ones(2, 2, 1, 28, 4))
    grown = cache.find(names(trunk(*range(60))), 60)
    assert grown is not None and grown.shape[3] == 60
    counts = cache.counts
    assert (counts.tokens_found, counts.tokens_missed) == (40 + 32 + 60, 40 + 28)


def test_what_is_kept_does_not_change_with_what_it_was_copied_from() -> None:
    cache = PrefixCache(10**6)
    computed = filled(16)
    cache.keep(names(trunk(*range(16))), 0, computed)
    computed.zero_()
    found = cache.find(names(trunk(*range(16))), 16)
    assert found is not None and bool((found == 1).all())


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 90)), min_size=1, max_size=30),
    st.sampled_from([0, 2000, 8000]),
)
def test_the_budget_holds_and_no_end_outlives_its_beginning(keeps: list[tuple[int, int]], budget: int) -> None:
    cache = PrefixCache(budget)
    segments = [trunk(first, *range(1, length)) for first, length in keeps]
    for segment in segments:
        found = cache.find(names(segment), len(segment))
        known = 0 if found is None else found.shape[3]
        if known < len(segment):
            cache.keep(names(segment), known, filled(len(segment) - known))
        assert cache.counts.bytes_held <= budget
        held = [[name in cache._chunks for name in names(one)] for one in segments]
        assert all(one == sorted(one, reverse=True) for one in held)
    assert cache.counts.bytes_held == sum(chunk.nbytes for chunk in cache._chunks.values())


def test_the_one_unused_for_longest_goes_first() -> None:
    chunk_bytes = filled(CHUNK_TOKENS).nbytes
    cache = PrefixCache(2 * chunk_bytes)
    first, second, third = (names(trunk(*range(i, i + 16))) for i in (0, 100, 200))
    cache.keep(first, 0, filled(16))
    cache.keep(second, 0, filled(16))
    cache.find(first, 16)
    cache.keep(third, 0, filled(16))
    assert [cache.find(one, 16) is not None for one in (first, second, third)] == [True, False, True]
