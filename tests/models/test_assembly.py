import numpy as np
import pytest

from models.assembly import Assembler, history_window
from models.features import ItemFeatures, Tables


def features(tables: Tables, *ids: str) -> list[ItemFeatures]:
    found = [tables.item(one) for one in ids]
    assert all(found)
    return [one for one in found if one]


def test_a_trained_user_keeps_the_trained_vector_whatever_the_history(assembler: Assembler, tables: Tables) -> None:
    user = tables.user("u1")
    assert user is not None and user.vector_C is not None
    for window in ([], features(tables, "i3", "i4")):
        np.testing.assert_array_equal(assembler.user(user, window, len(window)).vector_C, user.vector_C)


def test_a_user_without_training_is_folded_in_from_what_the_prompt_shows(assembler: Assembler, tables: Tables) -> None:
    window = features(tables, "i3", "i4", "i39")
    unknown = assembler.user(None, window, 3)
    cold = assembler.user(tables.user("u18"), window, 3)
    expected = assembler.prior.fold_in(np.stack([item.fold_C for item in window]))
    assert unknown.cold and cold.cold
    np.testing.assert_array_equal(unknown.vector_C, expected)
    np.testing.assert_array_equal(cold.vector_C, expected)


def test_the_history_report_adds_up(assembler: Assembler, tables: Tables) -> None:
    user = tables.user("u0")
    assert user is not None and user.history_total == 23
    window = history_window(user.history, user.history_total, assembler.template)
    report = assembler.user(user, features(tables, *window), user.history_total).history
    assert (report.given, report.used, report.dropped) == (23, len(window), 23 - len(window))
    assert len(window) == 8  # anchored: the window starts at 15


def test_a_tail_too_short_for_the_window_is_an_error(assembler: Assembler) -> None:
    with pytest.raises(ValueError, match="needs its last 8; 2 were given"):
        history_window(["a", "b"], 23, assembler.template)


def test_an_item_outside_the_catalogue_takes_its_vectors_from_its_text(tables: Tables) -> None:
    semantic = np.ones(tables.semantic_ID.shape[1], np.float32)
    item = tables.unseen_item("new", "A Title", semantic)
    assert not item.trained
    np.testing.assert_array_equal(item.collab_C, tables.text_map(semantic[None])[0])
    np.testing.assert_array_equal(item.semantic_D, semantic)


def test_candidates_keep_their_order(assembler: Assembler, tables: Tables) -> None:
    items = features(tables, "i5", "i1", "i9")
    group = assembler.group(assembler.user(None, [], 0), items)
    np.testing.assert_array_equal(group.item_KC, np.stack([item.collab_C for item in items]))
    np.testing.assert_array_equal(group.semantic_KD, np.stack([item.semantic_D for item in items]))
    assert len({branch.attach for branch in group.pack.branches}) == 1
