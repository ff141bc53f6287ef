"""The service and `evaluate --live` get the same events in the same order: their scores are equal."""

from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from models.loading import Bundle
from service.engines.packed import PackedModel
from tests.service.conftest import client_of, collaborators
from tests.service.direct import DirectEngine
from tests.training.micro import Trained
from training.counts import LIVE, row_counts
from training.data.dataset import Dataset, load_dataset
from training.data.history import build_histories
from training.evaluate import Scorer, score_split
from training.fusion import scores_of

ROWS = 120

pytestmark = pytest.mark.anyio


async def test_a_split_replayed_through_the_service_gets_the_scores_of_evaluate_live(
    trained: Trained, bundle: Bundle, scorer: Scorer, tmp_path: Path
) -> None:
    whole = load_dataset(trained.data)
    test = whole.splits["test"].sort("timestamp", maintain_order=True).head(ROWS)
    data = Dataset(whole.items, {**whole.splits, "test": test})
    assert test["timestamp"][0] > bundle.manifest.counted_until
    scored = score_split(scorer, data, build_histories(data), "test", 2048)
    counts = row_counts(data, "test", LIVE)

    engine = DirectEngine(PackedModel(bundle, scorer.model, batch_tokens=2048))
    service = collaborators(bundle, engine, interactions=tmp_path / "log.sqlite", batch_tokens=2048)
    await service.interactions.start()
    served: list[tuple[float, float]] = []
    async with client_of(service) as client:
        for _, rows in groupby(enumerate(test.iter_rows(named=True)), key=lambda one: one[1]["timestamp"]):
            second = list(rows)
            pairs = [{"user_id": one["user_id"], "item_id": one["item_id"]} for _, one in second]
            answer = (await client.post("/score", json={"pairs": pairs})).json()
            assert answer["counts"] == "live"
            served += [(one["raw_score"], one["score"]) for one in answer["results"]]
            events = [{**one, "label": bool(one["label"]), "event_id": f"e{row}"} for row, one in second]
            for one in events:
                del one["weight"]
            assert (await client.post("/interactions", json={"interactions": events})).status_code == 200
    await service.interactions.close()

    raw_B, score_B = np.array(served, np.float32).T
    # A forward of another size rounds differently.
    np.testing.assert_allclose(raw_B, scored.raw_B, atol=5e-6)
    scored = replace(scored, raw_B=raw_B)
    np.testing.assert_allclose(score_B, scores_of(bundle.fusion(), scored.known(counts, live=True)), atol=1e-6)
    at_first = scored.known(row_counts(in_one_second(data), "test", LIVE), live=True)
    assert np.abs(scores_of(bundle.fusion(), at_first) - score_B).max() > 1e-3  # outcomes do move later scores


def in_one_second(data: Dataset) -> Dataset:
    """Return the data with every test row in the first one's second: none of them counts for another."""
    first = data.splits["test"]["timestamp"][0]
    return Dataset(data.items, {**data.splits, "test": data.splits["test"].with_columns(timestamp=first)})
