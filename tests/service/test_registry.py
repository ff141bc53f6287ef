from collections import Counter

import pytest

from service.bundles.registry import place_of

USERS = [f"user-{number}" for number in range(20_000)]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_a_canary_gets_its_share_of_the_users(share: float) -> None:
    got = sum(place_of(user, "a" * 64) < share for user in USERS) / len(USERS)
    assert abs(got - share) < 4 * (share * (1 - share) / len(USERS)) ** 0.5


def test_a_user_stays_where_it_is_and_a_growing_share_keeps_who_was_in_it() -> None:
    # Written down, because every server of every version must agree on it.
    assert place_of("u1", "b" * 64) == pytest.approx(0.72503067, abs=1e-8)
    small = {user for user in USERS if place_of(user, "a" * 64) < 0.1}
    assert small < {user for user in USERS if place_of(user, "a" * 64) < 0.2}


def test_another_canary_is_tried_on_other_users() -> None:
    both = Counter((place_of(user, "a" * 64) < 0.5, place_of(user, "b" * 64) < 0.5) for user in USERS)
    assert all(abs(count / len(USERS) - 0.25) < 0.02 for count in both.values())


def test_a_user_id_of_any_text_has_a_place() -> None:
    assert all(0 <= place_of(user, "") < 1 for user in ("", "\ud800", "夜" * 200))
