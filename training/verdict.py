"""The verdict: a bundle's `score` on a split beside what a practitioner would try first.

`fit` judges valid by fusions that were fitted on other users' rows; `evaluate` judges the bundle as it is.
"""

from typing import Any

from models.features import Floats, Tables
from models.fusion import Fusion, Rates
from training.baselines import Boosting, collab_scores, rate_scores
from training.counts import LIVE, STATIC, Counting, RowCounts, row_counts
from training.data.dataset import Dataset
from training.data.history import Histories
from training.evaluate import SCORE, ScoredSplit, judge
from training.fusion import cross_fitted, fit_fusion, fit_rates, scores_of

WITH_LIVE_COUNTS = "with live counts"  # of fit's report: the same judged with live counts


def judge_bundle(
    fusion: Fusion,
    scored: ScoredSplit,
    dataset: Dataset,
    histories: Histories,
    split: str,
    tables: Tables,
    counting: Counting,
) -> dict[str, Any]:
    """Return the report of a bundle on a split; a scorer that needs what is not there is named in "left out"."""
    counts = row_counts(dataset, split, counting, tables)
    boosting = Boosting.fit(dataset, histories, fusion.rates) if "train" in dataset.splits else None
    scores = {SCORE: scores_of(fusion, scored.known(counts))}
    scores |= _baselines(scored, dataset, histories, split, counting, counts, fusion.rates, boosting)
    report = judge(scores, dataset, histories, split, tables) | {"live": counting.live, "delay": counting.delay}
    if boosting is None:
        report["left out"] = {"boosting": _without_boosting(dataset)}
    if split == "valid":
        report["chosen on valid"] = ["checkpoints", "fusion"]
    return report


def fit_and_judge(
    scored: ScoredSplit, dataset: Dataset, histories: Histories, tables: Tables, seed: int
) -> tuple[Fusion, dict[str, Any]]:
    """Fit the fusion on valid; return it and its cross-fitted report on valid, with static and with live counts."""
    labels_B = dataset.splits["valid"]["label"].to_numpy()
    users_B = histories.of_split("valid").user_code
    rates = fit_rates(dataset.splits["train"])
    ways = {counting: row_counts(dataset, "valid", counting, tables) for counting in (STATIC, LIVE)}
    known = [scored.known(counts) for counts in ways.values()]
    boosting = Boosting.fit(dataset, histories, rates, seed)
    reports = []
    for crossed_B, (counting, counts) in zip(
        cross_fitted(known, labels_B, users_B, rates, seed=seed), ways.items(), strict=True
    ):
        scores = {SCORE: crossed_B}
        scores |= _baselines(scored, dataset, histories, "valid", counting, counts, rates, boosting)
        report = judge(scores, dataset, histories, "valid", tables) | {"live": counting.live, "delay": 0.0}
        # The fusion that judges a row was fitted on other users' rows; the checkpoints were chosen on these.
        report["chosen on valid"] = ["checkpoints"]
        if boosting is None:
            report["left out"] = {"boosting": _without_boosting(dataset)}
        reports.append(report)
    static, live = reports
    return fit_fusion(known, labels_B, users_B, rates), static | {WITH_LIVE_COUNTS: live}


def _baselines(
    scored: ScoredSplit,
    dataset: Dataset,
    histories: Histories,
    split: str,
    counting: Counting,
    counts: RowCounts,
    rates: Rates,
    boosting: Boosting | None,
) -> dict[str, Floats]:
    scores = {
        "raw": scored.raw_B,
        "collab": collab_scores(scored.user_BC, scored.item_BC),
        "rates": rate_scores(rates, counts),
    }
    if boosting is not None:
        scores["boosting"] = boosting.scores(dataset, histories, split, counting, counts)
    return scores


def _without_boosting(dataset: Dataset) -> str:
    return "train has one class alone" if "train" in dataset.splits else "the data folder has no train split"
