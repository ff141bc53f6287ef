"""The service and `evaluate --live` get the same events in the same order: their scores are equal."""

import time
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import pytest

from models.fusion import Fusion, Known, Weight, Weights
from models.loading import Bundle
from service.engines.packed import PackedModel
from tests.service.conftest import client_of, collaborators
from tests.service.direct import DirectEngine
from tests.training.micro import Trained
from training.batch import score_pairs
from training.counts import LIVE, row_counts, row_outcomes
from training.data.dataset import Dataset, load_dataset
from training.data.history import build_histories
from training.evaluate import Scorer, score_split
from training.fusion import scores_of
from training.inspection import describe_prompt

ROWS = 120

pytestmark = pytest.mark.anyio


async def test_a_split_replayed_through_the_service_gets_the_scores_of_evaluate_live(
    trained: Trained, bundle: Bundle, scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the test deletes a user: later requests get the scores of a user who was never seen before."""
    clock = Clock()
    monkeypatch.setattr("service.scoring.time", clock)
    fusion = with_recent_likes(bundle.fusion())
    monkeypatch.setattr(Bundle, "fusion", lambda self: fusion)
    whole = load_dataset(trained.data)
    test = whole.splits["test"].sort("timestamp", maintain_order=True).head(ROWS)
    assert test["timestamp"][0] > bundle.manifest.counted_until
    at_once = Dataset(whole.items, {**whole.splits, "test": test})
    in_train = set(whole.splits["train"]["user_id"])
    victim = next(one for one in test["user_id"] if one in in_train)
    again = test.filter(pl.col("item_id").is_in(whole.splits["train"]["item_id"].implode())).head(9)
    moments = (int(time.time()) + 1000 + pl.int_range(pl.len())).cast(test.schema["timestamp"])
    again = again.with_columns(user_id=pl.lit("stranger"), timestamp=moments)
    data = Dataset(whole.items, {**whole.splits, "test": pl.concat([test, again])})
    known = known_live(scorer, data)

    engine = DirectEngine(PackedModel(bundle, scorer.model, batch_tokens=2048))
    service = collaborators(bundle, engine, interactions=tmp_path / "log.sqlite", batch_tokens=2048)
    await service.interactions.start()
    async with client_of(service) as client:
        served = await replayed(client, test, clock)
        assert (await client.delete(f"/users/{victim}")).status_code == 200
        served += await replayed(client, again.with_columns(user_id=pl.lit(victim)), clock)
    await service.interactions.close()

    raw_B, score_B = np.array(served).T
    logit_B = np.log(raw_B) - np.log1p(-raw_B)
    # A forward of another size rounds differently.
    np.testing.assert_allclose(raw_B, 1 / (1 + np.exp(-known.lm_K)), atol=5e-6)
    np.testing.assert_allclose(score_B, scores_of(fusion, replace(known, lm_K=logit_B)), atol=1e-6)
    at_first = known_live(scorer, in_one_second(at_once))
    assert np.abs(scores_of(fusion, at_first) - score_B[:ROWS]).max() > 1e-3  # outcomes do move later scores
    # Without the update with outcomes the scores would differ: for trained, cold and deleted users.
    static_B = scores_of(fusion, replace(known, lm_K=logit_B, live_user_KC=known.user_KC))
    moved_B = np.abs(static_B - score_B) > 1e-4
    cold_B = known.cold_user_K[:ROWS]
    assert moved_B[:ROWS][cold_B].sum() > 5 and moved_B[:ROWS][~cold_B].sum() > 5 and moved_B[ROWS:].any()
    # The same holds for recent likes: of trained and cold users, and of likes after the deletion.
    nothing = replace(known, lm_K=logit_B, like_ages_KL=np.full_like(known.like_ages_KL, np.inf))
    moved_B = np.abs(scores_of(fusion, nothing) - score_B) > 1e-3
    assert moved_B[:ROWS][cold_B].any() and moved_B[:ROWS][~cold_B].any() and moved_B[ROWS:].any()
    negatives = known.user_impressions_K - known.user_positives_K
    assert (negatives[:ROWS][cold_B] > 0).any() and (negatives[ROWS:] > 0).any()


async def test_with_an_empty_log_the_service_and_the_commands_use_the_outcomes_of_the_bundle(
    bundle: Bundle, scorer: Scorer, tmp_path: Path
) -> None:
    tables = scorer.tables
    told = [one for one in tables.user_ids if tables.stored_outcomes(one)]
    cold = [one for one in told if not tables.user_trained_U[tables.user_ids.index(one)]]
    pairs = pl.DataFrame({"user_id": [*told[:20], *cold[:5]]}).with_columns(item_id=pl.lit(tables.item_ids[0]))
    pairs.write_csv(tmp_path / "pairs.csv")
    score_pairs(bundle, scorer, tmp_path / "pairs.csv", tmp_path / "out.csv", skip_unknown=False, chunk=100)
    written_B = pl.read_csv(tmp_path / "out.csv")["score"].to_numpy()
    engine = DirectEngine(PackedModel(bundle, scorer.model, batch_tokens=2048))
    service = collaborators(bundle, engine, interactions=tmp_path / "log.sqlite", batch_tokens=2048)
    await service.interactions.start()
    async with client_of(service) as client:
        answer = (await client.post("/score", json={"pairs": pairs.to_dicts()})).json()
    await service.interactions.close()
    assert answer["counts"] == "live" and cold
    np.testing.assert_allclose(written_B, [one["score"] for one in answer["results"]], atol=1e-5)
    without = replace(scorer, tables=replace(tables, outcomes=[()] * len(tables.user_ids)))
    moved = []
    for row, score in zip(pairs.iter_rows(named=True), written_B, strict=True):
        user_id, item_id = row["user_id"], row["item_id"]
        printed = describe_prompt(bundle, scorer, user_id, item_id, None, None)
        assert printed["score"] == pytest.approx(score, abs=1e-5)
        moved.append(abs(describe_prompt(bundle, without, user_id, item_id, None, None)["score"] - score))
    assert max(moved[:20]) > 1e-3 and max(moved[-len(cold[:5]) :]) > 1e-3


async def test_a_bundle_of_all_rows_serves_the_newest_of_them_with_an_empty_log(
    trained: Trained, scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle that `fit` writes holds test too: it scores the rows after test as `evaluate --live` does."""
    latest = Bundle.open(trained.bundle)
    assert latest.manifest.metrics == trained.report
    clock = Clock()
    monkeypatch.setattr("service.scoring.time", clock)
    whole = load_dataset(trained.data)
    test = whole.splits["test"]
    assert test["timestamp"].max() == latest.manifest.counted_until
    spread = int(test["timestamp"].max()) - int(test["timestamp"].min())  # type: ignore[arg-type]
    later = test.tail(60).with_columns(pl.col("timestamp") + spread + 1).sort("timestamp", maintain_order=True)
    data = Dataset(whole.items, {**whole.splits, "test": pl.concat([test, later])})
    known = known_live(scorer, data).rows(slice(test.height, None))
    fusion = latest.fusion()

    served_scorer = replace(scorer, tables=latest.tables())
    engine = DirectEngine(PackedModel(latest, served_scorer.model, batch_tokens=2048))
    service = collaborators(latest, engine, interactions=tmp_path / "log.sqlite", batch_tokens=2048)
    await service.interactions.start()
    async with client_of(service) as client:
        served = await replayed(client, later, clock)
    await service.interactions.close()
    raw_B, score_B = np.array(served).T
    logit_B = np.log(raw_B) - np.log1p(-raw_B)
    np.testing.assert_allclose(raw_B, 1 / (1 + np.exp(-known.lm_K)), atol=5e-6)
    np.testing.assert_allclose(score_B, scores_of(fusion, replace(known, lm_K=logit_B)), atol=1e-6)
    assert known.cold_user_K.any() and not known.cold_user_K.all()
    # The bundle as of the end of valid, with an empty log, does not know what its users liked in test.
    users = [one for one in later["user_id"].unique() if scorer.tables.user(one) is None]
    assert users and all(latest.tables().user(one) is not None for one in users)


def known_live(scorer: Scorer, data: Dataset) -> Known:
    """Return the fusion's inputs for the test rows, as `evaluate --live` computes them."""
    outcomes = row_outcomes(data, "test", LIVE, scorer.tables)
    scored = score_split(scorer, data, build_histories(data), "test", 2048, outcomes=outcomes)
    return scored.known(row_counts(data, "test", LIVE), live=True)


class Clock:
    """The time of the service's scores: the moment of the rows that are replayed."""

    monotonic = staticmethod(time.monotonic)

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now


def with_recent_likes(fusion: Fusion) -> Fusion:
    """Return the fusion with weights on the user's newest likes: the bundle's few rows of valid give them none."""

    def changed(weights: Weights) -> Weights:
        more = {
            name: Weight(value=one, low=one, high=one, most=1.4)
            for name, one in (("recent_likes", 0.5), ("recent_likes_slow", 0.3), ("recent_taste", 2.0))
        }
        return weights.model_copy(update={"weights": weights.weights | more})

    return fusion.model_copy(update={"static": changed(fusion.static), "live": changed(fusion.live)})


async def replayed(client: httpx.AsyncClient, rows: pl.DataFrame, clock: Clock) -> list[tuple[float, float]]:
    """For each second, request the scores of its rows, then post their outcomes; return (raw score, score) by row."""
    served: list[tuple[float, float]] = []
    for moment, together in groupby(rows.iter_rows(named=True), key=lambda one: one["timestamp"]):
        clock.now = float(moment)
        second = list(together)
        pairs = [{"user_id": one["user_id"], "item_id": one["item_id"]} for one in second]
        answer = (await client.post("/score", json={"pairs": pairs})).json()
        assert answer["counts"] == "live"
        served += [(one["raw_score"], one["score"]) for one in answer["results"]]
        events = [
            {**pair, "label": bool(one["label"]), "timestamp": moment, "event_id": f"e{moment}-{place}"}
            for place, (pair, one) in enumerate(zip(pairs, second, strict=True))
        ]
        assert (await client.post("/interactions", json={"interactions": events})).status_code == 200
    return served


def in_one_second(data: Dataset) -> Dataset:
    """Return the data with every test row in the first one's second: none of them counts for another."""
    first = data.splits["test"]["timestamp"][0]
    return Dataset(data.items, {**data.splits, "test": data.splits["test"].with_columns(timestamp=first)})
