"""Scoring interactions with a bundle's parts, by the same code as the service, and judging the scores.

Shapes: B rows of a split, K candidates of a group.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.assembly import NO_AGES, AssembledUser, Assembler, history_window, like_ages
from models.features import Floats, ItemFeatures, Tables, UserFeatures
from models.fusion import Counts, Doubles, Known, probabilities
from models.ids import IdError
from models.packs import ScoringGroup
from models.scoring_model import ScoringModel
from models.template import window_start
from training.counts import RowCounts, RowOutcomes
from training.data.dataset import Dataset
from training.data.history import Histories
from training.metrics import REPLICATES, Interval, compare_scores, evaluate_scores
from training.progress import Progress, no_progress

SCORE = "score"  # the scorer that the bundle serves
SCORING_TOKENS = 4096  # tokens of one forward without gradients; on a CPU twice as fast as 1,024 with a small model
GROUPS_AT_ONCE = 64  # groups handed to the model together, so that forwards fill up and memory stays bounded


@dataclass(frozen=True)
class Scorer:
    """A bundle's parts, loaded: the model, its tables and the assembler of its prompts."""

    model: ScoringModel
    tables: Tables
    assembler: Assembler

    def item(self, item_id: str, title: str) -> ItemFeatures:
        """Return an item's features; one outside the catalogue is distilled from its title on the spot."""
        return self.tables.item(item_id) or self.items({item_id: title})[item_id]

    def items(self, titles: dict[str, str]) -> dict[str, ItemFeatures]:
        """Return the features of items by id; those outside the catalogue are distilled together."""
        found = {item_id: item for item_id in titles if (item := self.tables.item(item_id)) is not None}
        unseen = [item_id for item_id in titles if item_id not in found]
        if unseen:
            template = self.assembler.template
            prompts = [template.distil(self.assembler.title(titles[item_id])) for item_id in unseen]
            for item_id, semantic_D in zip(unseen, self.model.distil(prompts), strict=True):
                found[item_id] = self.tables.unseen_item(item_id, titles[item_id], semantic_D)
        return found

    def stored_user(self, user_id: str) -> AssembledUser:
        """Assemble a user with the bundle's stored history and outcomes; no like is recent."""
        user = self.tables.user(user_id)
        history, total = (user.history, user.history_total) if user else ((), 0)
        return replace(self.updated(user_id, self.user(user, history, total)), like_ages_L=NO_AGES)

    def updated(self, user_id: str, user: AssembledUser) -> AssembledUser:
        """Return the user with a live vector updated with the bundle's outcomes.

        The score is for a moment long after the bundle's last row: the drift that the outcomes show is over.
        """
        evidence = self.tables.evidence(user_id, self.tables.stored_outcomes(user_id))
        return self.assembler.updated(user, evidence, at=np.inf)

    def user_counts(self, user_id: str) -> Counts:
        """Return the bundle's counts of a user; zero for an unknown user."""
        user = self.tables.user(user_id)
        return Counts() if user is None else user.counts

    def user(self, user: UserFeatures | None, history: Sequence[str], total: int) -> AssembledUser:
        """Assemble a user under the tail of a history of `total` catalogue items.

        Raises:
            IdError: an item in the window is not in the catalogue.
        """
        window = []
        for item_id in history_window(history, total, self.assembler.template):
            item = self.tables.item(item_id)
            if item is None:
                raise IdError(f"history item {item_id!r} is not in the bundle's catalogue; leave it out")
            window.append(item)
        return self.assembler.user(user, window, total)


@dataclass(frozen=True)
class ScoredSplit:
    """The raw scores of a split's rows, and the other inputs of the fusion except the counts; `(B,)` and `(B, C)`.

    `live_user_BC` are the users' vectors updated with the outcomes known at each row; None if no outcomes were given.
    """

    logit_B: Floats
    user_BC: Floats
    live_user_BC: Floats | None
    item_BC: Floats
    liked_BC: Floats
    like_ages_BL: Floats
    cold_user_B: NDArray[np.bool_]
    cold_item_B: NDArray[np.bool_]

    @property
    def raw_B(self) -> Doubles:  # noqa: N802
        """The raw scores: the probabilities of the logits."""
        return probabilities(self.logit_B)

    def known(self, counts: RowCounts, *, live: bool) -> Known:
        """Return the fusion's inputs for the rows with these counts. `live` says whether the counts are live.

        Raises:
            ValueError: the counts are live, but the split was scored without outcomes.
        """
        live_user_BC = self.live_user_BC if live else self.user_BC
        if live_user_BC is None:
            raise ValueError("live counts need live vectors; give score_split the outcomes known at the rows")
        return Known(
            lm_K=self.logit_B,
            user_KC=self.user_BC,
            live_user_KC=live_user_BC,
            item_KC=self.item_BC,
            liked_KC=self.liked_BC,
            user_impressions_K=counts.user_impressions_B,
            user_positives_K=counts.user_positives_B,
            item_impressions_K=counts.item_impressions_B,
            item_positives_K=counts.item_positives_B,
            cold_user_K=self.cold_user_B,
            cold_item_K=self.cold_item_B,
            like_ages_KL=self.like_ages_BL,
            live=live,
        )


def score_split(
    scorer: Scorer,
    dataset: Dataset,
    histories: Histories,
    split: str,
    max_tokens: int = SCORING_TOKENS,
    progress: Progress = no_progress,
    outcomes: RowOutcomes | None = None,
) -> ScoredSplit:
    """Score every row of a split with the history at the row's time; `outcomes` update the live vectors.

    The bundle's stored histories are not used: they hold likes that came after the row.
    """
    frame, rows = dataset.splits[split], histories.of_split(split)
    item_ids = dataset.items["item_id"].to_list()
    items = scorer.items(dict(zip(item_ids, dataset.items["title"].to_list(), strict=True)))
    user_ids = frame["user_id"].to_list()
    times_B = frame["timestamp"].cast(pl.Float64).to_list()
    width, template = len(scorer.tables.prior.mean_C), scorer.assembler.template
    scored = ScoredSplit(
        logit_B=np.empty(frame.height, np.float32),
        user_BC=np.empty((frame.height, width), np.float32),
        live_user_BC=None if outcomes is None else np.empty((frame.height, width), np.float32),
        item_BC=np.stack([items[one].collab_C for one in item_ids])[rows.item_row],
        liked_BC=np.empty((frame.height, width), np.float32),
        like_ages_BL=np.full((frame.height, template.config.max_history), np.inf, np.float32),
        cold_user_B=np.empty(frame.height, bool),
        cold_item_B=np.array([not items[one].trained for one in item_ids])[rows.item_row],
    )
    done = 0
    for runs in _chunks(list(_runs(rows.user_code, rows.length)), GROUPS_AT_ONCE):
        groups: list[ScoringGroup] = []
        for run in runs:
            total = int(rows.length[run[0]])
            history = histories.positives_of(int(rows.user_code[run[0]]))[:total]
            liked_at = histories.times_of(int(rows.user_code[run[0]]))[:total]
            window = history[window_start(total, template.config) :]
            user = scorer.assembler.user(
                scorer.tables.user(user_ids[run[0]]), [items[item_ids[row]] for row in window], total
            )
            scored.user_BC[run], scored.liked_BC[run], scored.cold_user_B[run] = user.vector_C, user.liked_C, user.cold
            for row in run.tolist():
                ages_L = like_ages(liked_at, times_B[row], template)
                scored.like_ages_BL[row, : len(ages_L)] = ages_L
                if outcomes is not None and scored.live_user_BC is not None:
                    evidence = scorer.tables.evidence(user_ids[row], outcomes.of(row))
                    scored.live_user_BC[row] = scorer.assembler.updated(user, evidence, times_B[row]).live_C
            groups.append(scorer.assembler.group(user, [items[item_ids[row]] for row in rows.item_row[run]]))
        for run, logits in zip(runs, scorer.model.logits(groups, max_tokens), strict=True):
            scored.logit_B[run] = logits
            done += len(run)
        progress(done, frame.height)
    return scored


def judge(
    scores: Mapping[str, NDArray[np.floating]],
    dataset: Dataset,
    histories: Histories,
    split: str,
    tables: Tables,
    *,
    replicates: int = REPLICATES,
) -> dict[str, Any]:
    """Return AUC, UAUC, log-loss and calibration error of `score` and of every other scorer.

    `score` is measured on all rows, on warm rows, on cold rows, on rows of new items and on rows whose history has at
    least two titles. Warm: user and item both have training data in the bundle. New items: the item has none, for any
    user. "score minus" has the paired differences between `score` and the others.
    """
    labels_B = dataset.splits[split]["label"].to_numpy()
    rows = histories.of_split(split)
    cold_user_B, cold_item_B = cold_rows(dataset, split, tables)
    warm_B = ~cold_user_B & ~cold_item_B
    measured, differences = compare_scores(scores, SCORE, labels_B, rows.user_code, replicates=replicates)
    report: dict[str, Any] = {"all": {"rows": len(labels_B), **_as_dict(measured.pop(SCORE))}}
    parts = {"warm": warm_B, "cold": ~warm_B, "new items": cold_item_B, "history": rows.length >= 2}
    for name, chosen in parts.items():
        report[name] = {"rows": int(chosen.sum())}
        if chosen.any():
            report[name] |= _as_dict(
                evaluate_scores(scores[SCORE][chosen], labels_B[chosen], rows.user_code[chosen], replicates=replicates)
            )
        else:
            nothing = {"value": None, "low": None, "high": None}
            report[name] |= dict.fromkeys(("auc", "uauc", "log_loss", "ece"), nothing)
    report["scorers"] = {name: _as_dict(one) for name, one in measured.items()}
    report["score minus"] = {name: _as_dict(one) for name, one in differences.items()}
    return report


def cold_rows(dataset: Dataset, split: str, tables: Tables) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which rows have a user, and which an item, without training data, `(B,)` each."""
    frame = dataset.splits[split]
    users = {one for one, trained in zip(tables.user_ids, tables.user_trained_U, strict=True) if trained}
    items = {one for one, trained in zip(tables.item_ids, tables.item_trained_I, strict=True) if trained}
    return ~frame["user_id"].is_in(users).to_numpy(), ~frame["item_id"].is_in(items).to_numpy()


def _as_dict(measured: dict[str, Interval]) -> dict[str, dict[str, float | None]]:
    return {metric: interval.as_dict() for metric, interval in measured.items()}


def _runs(user_B: NDArray[np.int32], length_B: NDArray[np.int32]) -> Iterator[NDArray[np.int64]]:
    """Yield the rows that share a user and a history: they share a prompt."""
    order = np.lexsort((length_B, user_B))
    changes = (np.diff(user_B[order]) != 0) | (np.diff(length_B[order]) != 0)
    yield from np.split(order, np.flatnonzero(changes) + 1)


def _chunks(values: Sequence[NDArray[np.int64]], size: int) -> Iterator[Sequence[NDArray[np.int64]]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
