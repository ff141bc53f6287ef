import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from models.features import ItemFeatures, UserFeatures
from models.fusion import Counts
from service.features.codec import Codec, Precision, RecordError

CODEC = Codec(d_collab=3, d_model=5)
IDS = st.text(min_size=1, max_size=12).filter(str.isprintable)
COUNTS = st.builds(Counts, st.integers(0, 2**63), st.integers(0, 2**63))
FINITE = st.floats(-60_000, 60_000, width=32)


def vector(length: int) -> st.SearchStrategy[NDArray[np.float32]]:
    return arrays(np.float32, length, elements=FINITE)


ITEMS = st.builds(ItemFeatures, IDS, IDS, vector(3), vector(3), vector(5), st.booleans(), COUNTS)
HISTORIES = st.lists(st.tuples(IDS, st.floats(0, 2e9)), max_size=20)


@st.composite
def users(draw: st.DrawFn) -> UserFeatures:
    history = draw(HISTORIES)
    return UserFeatures(
        draw(IDS),
        draw(st.none() | vector(3)),
        tuple(one for one, _ in history),
        tuple(time for _, time in history),
        draw(st.integers(len(history), 2**32 - 1)),
        draw(COUNTS),
    )


@given(item=ITEMS)
def test_an_item_comes_back_to_the_bit_and_its_beginning_alone_as_history(item: ItemFeatures) -> None:
    record = CODEC.encode_item(item, Precision.FLOAT32)
    back = CODEC.decode_item(item.item_id, record)
    assert (back.item_id, back.title, back.trained) == (item.item_id, item.title, item.trained)
    assert back.counts == item.counts
    for name in ("collab_C", "fold_C", "semantic_D"):
        assert getattr(back, name).tobytes() == getattr(item, name).tobytes()
    part = CODEC.decode_history_part(item.item_id, record[: len(record) - 4 * (3 + 5) - 16])
    assert (part.title, part.fold_C.tobytes()) == (item.title, item.fold_C.tobytes())
    assert not hasattr(part, "semantic_D")


@given(user=users())
def test_a_user_comes_back_to_the_bit(user: UserFeatures) -> None:
    back = CODEC.decode_user(user.user_id, CODEC.encode_user(user, Precision.FLOAT32))
    assert (back.history, back.history_times, back.history_total) == (
        user.history,
        user.history_times,
        user.history_total,
    )
    assert back.counts == user.counts
    assert (back.vector_C is None) == (user.vector_C is None)
    if user.vector_C is not None and back.vector_C is not None:
        assert back.vector_C.tobytes() == user.vector_C.tobytes()


@pytest.mark.parametrize(("precision", "error"), [(Precision.FLOAT16, 2**-11), (Precision.BFLOAT16, 2**-8)])
@given(item=ITEMS)
def test_half_the_bytes_cost_at_most_half_a_step_of_the_precision(
    precision: Precision, error: float, item: ItemFeatures
) -> None:
    back = CODEC.decode_item(item.item_id, CODEC.encode_item(item, precision))
    np.testing.assert_allclose(back.semantic_D, item.semantic_D, rtol=error, atol=2**-24)
    assert back.semantic_D.dtype == np.float32


@settings(max_examples=300)
@given(item=ITEMS, data=st.data())
def test_one_altered_byte_anywhere_is_found(item: ItemFeatures, data: st.DataObject) -> None:
    record = bytearray(CODEC.encode_item(item, data.draw(st.sampled_from(list(Precision)))))
    record[data.draw(st.integers(0, len(record) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RecordError):
        CODEC.decode_item(item.item_id, bytes(record))


@settings(max_examples=300)
@given(user=users(), data=st.data())
def test_one_altered_byte_of_a_user_is_found(user: UserFeatures, data: st.DataObject) -> None:
    record = bytearray(CODEC.encode_user(user, Precision.FLOAT32))
    record[data.draw(st.integers(0, len(record) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RecordError):
        CODEC.decode_user(user.user_id, bytes(record))


@given(item=ITEMS, data=st.data())
def test_a_record_cut_short_or_under_another_id_is_found(item: ItemFeatures, data: st.DataObject) -> None:
    record = CODEC.encode_item(item, Precision.FLOAT32)
    with pytest.raises(RecordError):
        CODEC.decode_item(item.item_id, record[: data.draw(st.integers(0, len(record) - 1))])
    with pytest.raises(RecordError):
        CODEC.decode_item(item.item_id + "x", record)


@given(garbage=st.binary(max_size=80))
def test_bytes_from_anywhere_are_an_error_of_one_kind(garbage: bytes) -> None:
    for decode in (CODEC.decode_item, CODEC.decode_history_part, CODEC.decode_user):
        with pytest.raises(RecordError):
            decode("one", garbage)


def test_numbers_that_a_precision_cannot_hold_are_refused() -> None:
    large = np.full(3, 1e6, np.float32)
    item = ItemFeatures("i", "A title", large, large, np.zeros(5, np.float32), trained=True)
    with pytest.raises(RecordError, match="float16"):
        CODEC.encode_item(item, Precision.FLOAT16)
    assert CODEC.decode_item("i", CODEC.encode_item(item, Precision.BFLOAT16)).collab_C[0] == pytest.approx(1e6, 2**-8)
