"""The verdict: compares a bundle's `score` on a split with simple scorers.

`fit` judges valid by fusions that were fitted on other users' rows; `evaluate` judges the bundle's own fusion.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.features import Floats, Tables
from models.fusion import Fusion, Rates
from training.baselines import Boosting, collab_scores, rate_scores
from training.counts import LIVE, STATIC, Counting, RowCounts, row_counts
from training.data.dataset import Dataset
from training.data.history import Histories
from training.evaluate import SCORE, ScoredSplit, judge
from training.fusion import cross_fitted, fit_fusion, fit_rates, scores_of

WITH_LIVE_COUNTS = "with live counts"  # key in the report of `fit`: the same report with live counts


class FittedFusion(NamedTuple):
    """A fusion fitted on valid, its report, and valid's cross-fitted scores with live counts, `(B,)`."""

    fusion: Fusion
    report: dict[str, Any]
    live_B: Floats


def judge_bundle(
    fusion: Fusion,
    scored: ScoredSplit,
    dataset: Dataset,
    histories: Histories,
    split: str,
    tables: Tables,
    counting: Counting,
) -> dict[str, Any]:
    """Return the report of a bundle on a split; "left out" names a scorer that cannot be fitted, and the reason."""
    if split == "train":  # its rows are always counted live (training/counts.py)
        counting = replace(counting, live=True)
    counts = row_counts(dataset, split, counting, tables)
    boosting = Boosting.fit(dataset, histories, fusion.rates) if "train" in dataset.splits else None
    scores = {SCORE: scores_of(fusion, scored.known(counts, live=counting.live))}
    scores |= _baselines(scored, dataset, histories, split, counting, counts, fusion.rates, boosting)
    report = judge(scores, dataset, histories, split, tables) | _circumstances(counting, dataset, boosting)
    return report | ({"chosen on valid": ["checkpoints", "fusion"]} if split == "valid" else {})


def fit_and_judge(
    scored: ScoredSplit, dataset: Dataset, histories: Histories, tables: Tables, seed: int
) -> FittedFusion:
    """Fit the fusion on valid, and judge valid by cross-fitted scores, with static and with live counts."""
    labels_B = dataset.splits["valid"]["label"].to_numpy()
    users_B = histories.of_split("valid").user_code
    rates = fit_rates(dataset.splits["train"])
    boosting = Boosting.fit(dataset, histories, rates, seed)
    known, crossed, reports = [], [], []
    for counting in (STATIC, LIVE):
        counts = row_counts(dataset, "valid", counting, tables)
        known.append(scored.known(counts, live=counting.live))
        crossed.append(cross_fitted(known[-1], labels_B, users_B, rates, seed=seed))
        scores = {SCORE: crossed[-1]}
        scores |= _baselines(scored, dataset, histories, "valid", counting, counts, rates, boosting)
        report = judge(scores, dataset, histories, "valid", tables) | _circumstances(counting, dataset, boosting)
        # The fusion that judges a row was fitted on other users' rows. The checkpoints were chosen on valid.
        reports.append(report | {"chosen on valid": ["checkpoints"]})
    fusion = fit_fusion(known[0], known[1], labels_B, users_B, rates)
    return FittedFusion(fusion, reports[0] | {WITH_LIVE_COUNTS: reports[1]}, crossed[1])


def _baselines(
    scored: ScoredSplit,
    dataset: Dataset,
    histories: Histories,
    split: str,
    counting: Counting,
    counts: RowCounts,
    rates: Rates,
    boosting: Boosting | None,
) -> dict[str, NDArray[np.floating]]:
    scores: dict[str, NDArray[np.floating]] = {
        "raw": scored.raw_B,
        "collab": collab_scores(scored.user_BC, scored.item_BC),
        "rates": rate_scores(rates, counts),
    }
    if boosting is not None:
        scores["boosting"] = boosting.scores(dataset, histories, split, counting, counts)
    return scores


def _circumstances(counting: Counting, dataset: Dataset, boosting: Boosting | None) -> dict[str, Any]:
    found: dict[str, Any] = {"live": counting.live, "delay": counting.delay}
    if boosting is None:
        reason = "train has only one class" if "train" in dataset.splits else "the data folder has no train split"
        found["left out"] = {"boosting": reason}
    return found
