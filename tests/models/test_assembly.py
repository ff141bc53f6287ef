import numpy as np
import pytest

from models.assembly import Assembler, history_window, like_ages
from models.features import ItemFeatures, Outcome, Tables


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


def test_outcomes_update_the_live_vector_alone(assembler: Assembler, tables: Tables) -> None:
    known = [Outcome("i3", True, 1.0), Outcome("i5", False, 2.0), Outcome("not in the catalogue", True, 3.0)]
    window = features(tables, "i3", "i4")
    for user_id in ("u1", "u18"):
        user = assembler.user(tables.user(user_id), window, 2)
        np.testing.assert_array_equal(user.live_C, user.vector_C)
        evidence = tables.evidence(user_id, known)
        assert evidence.labels_H.tolist() == [1, 0] and evidence.positives == {"i3"}
        updated = assembler.updated(user, evidence, at=9.0)
        np.testing.assert_array_equal(updated.vector_C, user.vector_C)
        trained_C, seen = (None, 0) if user.cold else (user.vector_C, evidence.impressions)
        # "i3" is observed once, as an outcome. "i4" is observed as a liked item if the user is cold.
        vectors = [np.stack([item.fold_C for item in features(tables, *ids)]) for ids in (("i3", "i5"), ("i4",))]
        expected = assembler.prior.updated(
            trained_C, seen, vectors[0], np.array([1, 0], np.float32), np.array([1.0, 2.0]), 9.0, vectors[1]
        )
        np.testing.assert_array_equal(updated.live_C, expected)
        assert np.abs(updated.live_C - user.live_C).max() > 1e-3
    assert tables.evidence("u1", []).impressions > 0 == tables.evidence("u18", []).impressions


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


def test_the_ages_are_those_of_the_newest_likes_and_never_negative(assembler: Assembler) -> None:
    times = [float(one) for one in range(100, 125)]
    ages_L = like_ages(times, 122.5, assembler.template)
    most = assembler.template.config.max_history
    assert 5 < most < 25 and ages_L.tolist() == [max(0.0, 122.5 - one) for one in times[25 - most :]]
    assert like_ages([], 5.0, assembler.template).shape == (0,)


def test_the_likes_in_the_prompt_have_a_mean_vector(assembler: Assembler, tables: Tables) -> None:
    window = features(tables, "i3", "i4")
    for user_id in ("u1", "u18"):
        liked_C = assembler.user(tables.user(user_id), window, 2).liked_C
        np.testing.assert_allclose(liked_C, (window[0].fold_C + window[1].fold_C) / 2, atol=1e-7)
    assert not assembler.user(tables.user("u1"), [], 0).liked_C.any()
