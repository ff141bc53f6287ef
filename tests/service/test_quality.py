"""Live quality: outcomes find the scores they answer, and the figures are those of scikit-learn."""

import tracemalloc

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from models.loading import Bundle
from service.collaborators import Collaborators
from service.interactions.event import Interaction
from service.metrics.registry import Metrics
from service.quality.live import LiveQuality
from service.quality.served import ServedScore, ServedScores
from service.quality.window import LabelledWindow, figures_of

BUNDLE = "ab" * 32
LABEL = BUNDLE[:12]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Live:
    """Live quality of one bundle, with its metrics and clock."""

    def __init__(self, most: int = 1000, oldest_s: float = 60.0) -> None:
        self.metrics, self.clock = Metrics(quality_window=100), Clock()
        self.metrics.loaded(BUNDLE, {})
        self.served = ServedScores(most, oldest_s)
        self.live = LiveQuality(self.served, self.metrics.quality, self.clock)

    def rank(self, request_id: str, user_id: str, **scores: float) -> None:
        results = [ServedScore(rank, user_id, item, score) for rank, (item, score) in enumerate(scores.items(), 1)]
        self.live.remember(request_id, LABEL, results)

    def report(
        self, user_id: str, item_id: str, label: bool, request_id: str | None = "r", position: int | None = None
    ) -> None:
        self.live.on_outcome(Interaction("e", user_id, item_id, label, 0.0, request_id, position), label)

    def outcomes(self) -> dict[str, float]:
        found = {
            sample.labels["outcome"]: sample.value
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.name == "sella_outcomes_total"
        }
        return {outcome: count for outcome, count in found.items() if count}

    def value(self, name: str, **labels: str) -> float | None:
        self.metrics.text()
        return self.metrics.registry.get_sample_value(name, {"bundle": LABEL, **labels})


@given(
    pairs=st.lists(st.tuples(st.integers(0, 8).map(lambda step: step / 8), st.booleans()), min_size=2, max_size=60),
)
@settings(max_examples=80, deadline=None)
def test_auc_with_ties_log_loss_and_calibration_are_right(pairs: list[tuple[float, bool]]) -> None:
    scores, labels = np.array([score for score, _ in pairs]), np.array([label for _, label in pairs])
    figures = figures_of(scores, labels)
    if labels.all() or not labels.any():
        assert figures.auc is None
    else:
        assert figures.auc == pytest.approx(roc_auc_score(labels, scores))
    clipped = np.clip(scores, 1e-7, 1 - 1e-7)
    assert figures.log_loss == pytest.approx(log_loss(labels, clipped, labels=[False, True]), abs=1e-6)
    if labels.any():
        assert figures.calibration_ratio == pytest.approx(scores.mean() / labels.mean())
    error = 0.0
    for low in np.arange(10) / 10:
        inside = (scores >= low) & ((scores < low + 0.1) | (low > 0.85))
        if inside.any():
            error += inside.mean() * abs(scores[inside].mean() - labels[inside].mean())
    assert figures.calibration_error == pytest.approx(error, abs=0.02)


def test_the_window_holds_the_latest_and_relabels_what_it_holds() -> None:
    window = LabelledWindow(3)
    numbers = [window.add(score, False) for score in (0.1, 0.2, 0.3, 0.4)]
    window.relabel(numbers[0], True)  # left already: the place is another's now
    assert window.figures().positives == 0
    window.relabel(numbers[3], True)
    figures = window.figures()
    assert (figures.labelled, figures.positives, figures.auc) == (3, 1, 1.0)


def test_an_outcome_finds_its_score_by_position_or_by_pair() -> None:
    live = Live()
    live.rank("r", "u", a=0.9, b=0.2, c=0.6)
    live.report("u", "a", True, position=1)
    live.report("u", "b", False, position=2)
    live.report("u", "c", False)
    assert live.outcomes() == {"labelled": 3}
    assert live.value("sella_live_auc") == 1.0
    assert live.value("sella_live_calibration_ratio") == pytest.approx(1.7, abs=1e-6)
    assert live.value("sella_live_labelled", label="1") == 1
    assert live.value("sella_live_labelled", label="0") == 2


def test_an_outcome_that_fits_no_score_is_counted_by_why() -> None:
    live = Live()
    live.rank("r", "u", a=0.9, b=0.2)
    live.report("u", "a", True, request_id=None)
    live.report("u", "a", True, request_id="another")
    live.report("u", "a", True, position=3)
    live.report("u", "a", True, position=2)
    live.report("v", "a", True, position=1)
    live.report("u", "z", True)
    assert live.outcomes() == {"no_request": 1, "unknown_request": 1, "other_place": 1, "other_pair": 3}
    assert live.value("sella_live_labelled", label="1") == 0
    assert live.value("sella_live_auc") is None


def test_a_negative_may_become_positive_and_nothing_counts_twice() -> None:
    live = Live()
    live.rank("r", "u", a=0.9)
    for label in (False, False, True, True, False):
        live.report("u", "a", label)
    assert live.outcomes() == {"labelled": 1, "relabelled": 1, "repeated": 3}
    assert live.value("sella_live_labelled", label="1") == 1
    assert live.value("sella_live_labelled", label="0") == 0


def test_what_was_served_is_bounded_in_number_and_age() -> None:
    live = Live(most=4, oldest_s=60)
    live.rank("old", "u", a=0.5, b=0.5)
    live.rank("new", "u", c=0.5, d=0.5)
    assert live.served.scores == 4
    live.rank("newest", "u", e=0.5)
    assert live.served.scores == 3
    live.report("u", "a", True, request_id="old")
    live.clock.now = 61
    live.report("u", "e", True, request_id="newest")
    assert live.outcomes() == {"unknown_request": 2}
    assert live.served.scores == 0


def test_a_served_score_takes_about_a_hundred_bytes() -> None:
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        served = ServedScores(10_000, 60.0)
        for number in range(100):
            results = [ServedScore(rank, f"user-{number}", f"item-{number}-{rank}", 0.5) for rank in range(100)]
            served.add(f"request-{number}", LABEL, results, 0.0)
        del results
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert served.scores == 10_000
    assert 50 < (after - before) / served.scores < 130


def test_answers_without_results_take_no_memory() -> None:
    served = ServedScores(10, 60.0)
    served.add("full", LABEL, [ServedScore(0, "u", "a", 0.5)], 0.0)
    served.add("empty", LABEL, [], 0.0)
    assert served.find("full", 0.0) is not None and served.find("empty", 0.0) is None


def test_answers_to_two_users_under_one_request_id_are_told_apart() -> None:
    live = Live()
    live.rank("always", "u", a=0.9, b=0.2)
    live.rank("always", "v", b=0.4, a=0.3)
    live.report("u", "a", True, request_id="always", position=1)
    live.report("v", "b", False, request_id="always", position=1)
    live.report("w", "b", False, request_id="always", position=1)
    assert live.outcomes() == {"labelled": 2, "other_pair": 1}
    assert live.served.scores == 4
    live.live.forget("v")
    assert live.served.scores == 2
    live.report("u", "b", False, request_id="always", position=2)
    assert live.outcomes()["labelled"] == 3


def test_a_request_id_that_comes_again_stands_for_the_later_answer() -> None:
    live = Live()
    live.rank("r", "u", a=0.5, b=0.5)
    live.rank("r", "u", c=0.5)
    assert live.served.scores == 1
    live.report("u", "a", True)
    live.report("u", "c", True)
    assert live.outcomes() == {"other_pair": 1, "labelled": 1}


def test_a_deleted_user_and_a_retired_bundle_are_forgotten() -> None:
    live = Live()
    live.live.remember("pairs", LABEL, [ServedScore(0, "u", "a", 0.5), ServedScore(1, "v", "a", 0.5)])
    live.rank("r", "v", a=0.5)
    live.live.forget("u")
    assert live.served.scores == 1
    live.metrics.retired(BUNDLE)
    live.report("v", "a", True)
    assert live.outcomes() == {"retired_bundle": 1}


@pytest.mark.anyio
async def test_answers_are_labelled_by_what_they_told(
    client: httpx.AsyncClient, service: Collaborators, bundle: Bundle
) -> None:
    ranked = (await client.post("/rank", json={"user_id": "u0", "candidates": ["i1", "i2", "i3"], "top_k": 2})).json()
    pairs = [{"user_id": "u1", "item_id": "i5"}, {"user_id": "u2", "item_id": "i6"}]
    scored = (await client.post("/score", json={"pairs": pairs})).json()
    told = [(ranked, "u0", one, one["rank"]) for one in ranked["results"]]
    told += [(scored, one["user_id"], one, one["index"]) for one in scored["results"]]
    for place, (answer, user_id, result, position) in enumerate(told):
        event = Interaction("e", user_id, result["item_id"], None, 0.0, answer["request_id"], position)
        service.quality.on_outcome(event, place % 2 == 0)
    service.metrics.text()
    mine = {"bundle": bundle.id[:12]}
    found = {
        name: service.metrics.registry.get_sample_value(f"sella_live_{name}", mine) for name in ("auc", "log_loss")
    }
    scores, labels = [result["score"] for _, _, result, _ in told], [True, False, True, False]
    assert found["auc"] == pytest.approx(roc_auc_score(labels, scores))
    assert found["log_loss"] == pytest.approx(log_loss(labels, scores), rel=1e-5)
