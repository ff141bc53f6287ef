"""The history that is scored with: the bundle's and the live likes, as one."""

import asyncio
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.features import MAX_OUTCOMES, UserFeatures
from service.interactions.histories import MergedUser, merge_all, merged, united
from service.interactions.live import USERS_AT_ONCE, KnownOutcome, Like, LiveUser

VECTOR = np.ones(2, np.float32)


def stored(*likes: tuple[str, float], total: int | None = None, since: float = -math.inf) -> UserFeatures:
    items, times = tuple(item for item, _ in likes), tuple(time for _, time in likes)
    return UserFeatures("u", VECTOR, items, times, len(likes) if total is None else total, since=since)


def live(*likes: tuple[str, float], deleted_at: float | None = None) -> LiveUser:
    return LiveUser(
        tuple(sorted(Like(time, f"e{number}", item) for number, (item, time) in enumerate(likes))), deleted_at
    )


def told(one: MergedUser) -> tuple[tuple[str, ...], int, int]:
    assert one.features is not None
    assert len(one.features.history) == len(one.features.history_times)
    return one.features.history, one.features.history_total, one.likes


def test_new_likes_stand_where_their_time_says() -> None:
    both = merged("u", stored(("a", 1), ("b", 3), ("c", 5)), live(("x", 4), ("y", 3), ("z", 9), ("w", 0)))
    assert told(both) == (("w", "a", "b", "y", "x", "c", "z"), 7, 4)


def test_a_like_the_bundle_was_trained_on_is_not_doubled_and_the_same_item_later_is() -> None:
    both = merged("u", stored(("a", 1), ("b", 3)), live(("b", 3), ("b", 4), ("a", 1)))
    assert told(both) == (("a", "b", "b"), 3, 1)


def test_before_a_tail_nothing_is_inserted() -> None:
    tail = stored(("b", 3), ("c", 5), total=7)
    assert told(merged("u", tail, live(("a", 1), ("z", 3), ("x", 4)))) == (("b", "x", "c"), 8, 1)
    assert merged("u", tail, live(("a", 1))) == MergedUser(tail, 0)


def test_a_deleted_user_is_as_if_never_heard_of() -> None:
    assert merged("u", stored(("a", 1)), live(("b", 2), deleted_at=3)) == MergedUser(None, 0, deleted=True)
    back = merged("u", stored(("a", 9)), live(("b", 3), ("c", 4), deleted_at=3))
    assert told(back) == (("c",), 1, 1) and back.features is not None and back.features.vector_C is None


@pytest.mark.parametrize(("since", "used"), [(2.0, False), (3.0, False), (3.5, True)])
def test_a_bundle_that_learned_only_from_later_rows_knows_a_user_who_came_back(since: float, used: bool) -> None:
    """A deletion that is told of late, or that the training did not know, is no other case: the rows' times decide."""
    back = merged("u", stored(("a", 9), since=since), live(("b", 3), ("c", 10), deleted_at=3))
    assert told(back) == ((("a", "c"), 2, 1) if used else (("c",), 1, 1))
    assert back.features is not None and (back.features.vector_C is not None) == used == (not back.deleted)


def test_likes_of_items_that_nobody_knows_take_no_place_and_earlier_ones_take_theirs() -> None:
    seen = LiveUser(
        (Like(4, "e4", "x"), Like(5, "e5", "b"), Like(6, "e6", "y")), earlier=((3.0, "e3", "z"), (2.0, "e2", "a"))
    )
    user = merged("u", stored(("s", 1)), seen, lambda item_id: item_id in "abs", window=2)
    assert told(user) == (("s", "a", "b"), 3, 2) and user.total == 6
    assert user.like_times == [1, 2, 3, 4, 5, 6]
    few = merged("u", stored(("s", 1)), seen, lambda item_id: item_id in "abs", window=1)
    assert told(few) == (("s", "b"), 3, 1) and few.reach == 1  # "a" is missing in between


@pytest.mark.anyio
async def test_a_user_without_anything_live_is_the_bundles_own() -> None:
    known = stored(("a", 1))
    assert await merge_all(frozenset({"u", "v"}), {"u": known}, {}, {}) == {
        "u": MergedUser(known, 0),
        "v": MergedUser(None, 0),
    }


def test_events_known_twice_are_one_and_the_latest_deletion_counts() -> None:
    one, other = live(("a", 1), ("b", 2), deleted_at=0.5), live(("a", 1), ("b", 2), deleted_at=1.5)
    assert united(one, other) == LiveUser(one.likes, 1.5)
    assert told(merged("u", None, united(one, other)))[0] == ("b",)


def outcome(name: str, shown: float, positive: bool, item: str = "a") -> KnownOutcome:
    return KnownOutcome(shown, name, item, positive)


def test_impressions_known_to_several_servers_are_one_and_positive_wins() -> None:
    one = LiveUser(outcomes=(outcome("p", 1, False), outcome("q", 3, True)))
    other = LiveUser(outcomes=(outcome("r", 2, False), outcome("p", 2, True), outcome("q", 4, False)))
    joined = (outcome("p", 1, True), outcome("r", 2, False), outcome("q", 3, True))
    assert united(one, other).outcomes == united(other, one, other).outcomes == joined


def test_the_newest_outcomes_of_all_servers_are_kept() -> None:
    some = [outcome(f"p{number:03}", number, number % 2 == 0) for number in range(2 * MAX_OUTCOMES)]
    joined = united(LiveUser(outcomes=tuple(some[::2])), LiveUser(outcomes=tuple(some[1::2])))
    assert joined.outcomes == tuple(some[-MAX_OUTCOMES:])


def test_outcomes_of_impressions_before_a_deletion_are_not_used_whoever_tells_of_it() -> None:
    before = LiveUser(outcomes=(outcome("p", 1, True), outcome("q", 5, True)))
    deleted = LiveUser(deleted_at=3.0, outcomes=(outcome("p", 4, False),))  # shown again after the deletion
    both = merged("u", stored(("a", 1)), united(before, deleted))
    assert both.outcomes == (outcome("p", 4, False), outcome("q", 5, True)) and both.deleted
    alone = merged("u", None, LiveUser(deleted_at=3.0, outcomes=before.outcomes))
    assert alone.outcomes == (outcome("q", 5, True),)
    assert not merged("u", None, before).deleted


@pytest.mark.anyio
async def test_merging_many_users_lets_other_tasks_run() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await merge_all(frozenset(map(str, range(10 * USERS_AT_ONCE))), {}, {}, {})
    task.cancel()
    assert turns >= 10


histories = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), max_size=6)


@given(histories, histories, st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_with_a_whole_history_the_result_is_the_time_order_of_all(
    old: list[tuple[str, int]], new: list[tuple[str, int]], data: st.DataObject
) -> None:
    known = stored(*sorted(old, key=lambda one: one[1]))
    fresh = [one for one in new if one not in old]
    both = merged("u", known, live(*data.draw(st.permutations(new))))
    if not fresh:
        assert both == MergedUser(known, 0)
        return
    history, total, likes = told(both)
    assert total == len(history) == len(old) + len(fresh) and likes == len(fresh)
    assert both.features is not None and list(both.features.history_times) == sorted(both.features.history_times)
    assert sorted(history) == sorted(item for item, _ in [*old, *fresh])
    kept = iter(zip(history, both.features.history_times, strict=True))
    assert all(one in kept for one in zip(known.history, known.history_times, strict=True))  # in the bundle's order
