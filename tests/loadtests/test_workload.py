"""Requests: the same for the same seed, of people in Zipf's proportions, and nothing that the service refuses."""

import json
from collections import Counter

import httpx
import numpy as np
import pytest
from pydantic import ValidationError

from loadtests.server import Server
from loadtests.workload import Catalogue, Mix, Workload
from models.loading import Bundle

WIDE = Catalogue(
    tuple(f"u{row}" for row in range(50)),
    tuple(f"i{row}" for row in range(500)),
    tuple(f"T {row}" for row in range(500)),
)


def test_equal_seeds_give_equal_requests_and_others_do_not() -> None:
    first, again, other = (Workload(WIDE, seed=seed) for seed in (3, 3, 4))
    assert first.asks(50) == again.asks(50) != other.asks(50)
    alone = Catalogue(("u",), WIDE.item_ids, WIDE.titles)  # not only in who is popular
    assert Workload(alone, seed=3).asks(9) != Workload(alone, seed=4).asks(9)
    assert again.ask(17) == first.asks(50)[17]  # a request does not depend on those drawn before it


def test_users_come_in_zipfs_proportions() -> None:
    asks = Workload(WIDE, Mix(zipf=1.0, rank_share=1, sizes=(1,), size_weights=(1,))).asks(6000)
    counts = Counter(json.loads(ask.body)["user_id"] for ask in asks)
    expected = 6000 / np.arange(1, 51) / np.sum(1 / np.arange(1, 51))
    popular = [count for _, count in counts.most_common(5)]
    # Five standard deviations of each count.
    assert np.all(np.abs(popular - expected[:5]) < 5 * np.sqrt(expected[:5]))
    assert (
        counts.most_common(1)[0][0]
        == Workload(WIDE, Mix(zipf=20, rank_share=1)).ask(0).body.decode()[len('{"user_id":"') :].split('"')[0]
    )


def test_without_an_exponent_everybody_is_alike() -> None:
    asks = Workload(WIDE, Mix(zipf=0, rank_share=1, sizes=(1,), size_weights=(1,))).asks(4000)
    counts = Counter(json.loads(ask.body)["user_id"] for ask in asks)
    assert len(counts) == 50
    assert max(counts.values()) < 80 + 5 * 80**0.5


def test_shares_and_sizes_are_those_of_the_mix() -> None:
    mix = Mix(rank_share=0.25, sizes=(1, 10), size_weights=(0, 1), sent_share=1, unknown_share=0.5)
    asks = Workload(WIDE, mix).asks(400)
    assert {ask.candidates for ask in asks} == {10}
    assert 60 < sum(ask.path == "/rank" for ask in asks) < 140
    bodies = [json.loads(ask.body) for ask in asks]
    ranks = [body for body in bodies if "candidates" in body]
    assert all(1 <= len(body["history"]) <= 30 for body in ranks)
    candidates = [one for body in ranks for one in body["candidates"]]
    unknown = [one for one in candidates if isinstance(one, dict)]
    assert 0.4 < len(unknown) / len(candidates) < 0.6
    assert all(one["item_id"].startswith("unknown-") and one["title"] for one in unknown)
    pairs = [body["pairs"] for body in bodies if "pairs" in body]
    assert all(len({pair["user_id"] for pair in of}) == 1 and len(of) == 10 for of in pairs)


def test_a_large_ranking_is_filled_up_with_unknown_items() -> None:
    body = json.loads(Workload(WIDE).ranking(0, 600).body)["candidates"]
    ids = [one if isinstance(one, str) else one["item_id"] for one in body]
    assert len(set(ids)) == 600
    assert sum(isinstance(one, dict) for one in body) == 100


@pytest.mark.parametrize("wrong", [{"sizes": (1, 2)}, {"size_weights": (0, 0, 0)}, {"zip": 1}])
def test_a_mix_that_cannot_be_drawn_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Mix.model_validate(wrong)


def test_the_service_scores_every_kind_of_request(server: Server, bundle: Bundle) -> None:
    workload = Workload(Catalogue.read(bundle.folder), Mix(unknown_share=0.2))
    with httpx.Client(base_url=server.url, headers={"content-type": "application/json"}, timeout=60) as client:
        answers = [client.post(ask.path, content=ask.body) for ask in [*workload.asks(12), workload.ranking(0, 60)]]
    assert {answer.status_code for answer in answers} == {200}
    assert len(answers[-1].json()["results"]) == 60
