"""Simple scorers to compare `score` with: stage 2 alone, rates, boosting.

Shapes: B rows of a split, N rows of train, P pairs of a row and a word, I items, W words of all titles, F features.
"""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from threadpoolctl import threadpool_limits

from models.features import Floats
from models.fusion import Rates
from training.counts import LIVE, Counting, RowCounts, counted_before, row_counts
from training.data.dataset import Dataset
from training.data.history import Histories

WORDS = 64  # the most frequent title words; each is a feature
AFFINITY_WORDS = 1000  # the most frequent title words, for which each user's positives are counted
RATES = 3  # features whose larger value never lowers a score
MAX_ROWS = 1_000_000  # boosting is fitted on at most this many rows of train, the latest
ROWS_AT_ONCE = 200_000
YEAR = re.compile(r"\(((?:19|20)\d\d)\)\s*$")
WORD = re.compile(r"\w+")


def collab_scores(user_BC: Floats, item_BC: Floats) -> Floats:
    """Return stage 2's prediction of the label, `(B,)`: the vectors' inner product, clipped to 0.01 and 0.99."""
    predicted: Floats = np.clip(np.einsum("bc,bc->b", user_BC, item_BC), 0.01, 0.99).astype(np.float32)
    return predicted


def rate_scores(rates: Rates, counts: RowCounts) -> Floats:
    """Return probabilities, `(B,)`: the log-odds of the base rate plus the smoothed distances of user and item."""
    user_B = rates.distance(counts.user_positives_B, counts.user_impressions_B, rates.user_strength)
    item_B = rates.distance(counts.item_positives_B, counts.item_impressions_B, rates.item_strength)
    odds_B = np.exp(user_B + item_B) * rates.base / (1 - rates.base)
    return (odds_B / (1 + odds_B)).astype(np.float32)


@dataclass(frozen=True)
class Titles:
    """The words of the items' titles that more than one item has, the most frequent first.

    Attributes:
        features_IF: the year at the end of a title (NaN without one), and which of the `WORDS` most frequent words it
            has.
        words_W: the codes of every item's words among `AFFINITY_WORDS`, item after item.
        starts_I: [I + 1] where each item's words begin.
    """

    features_IF: Floats
    words_W: NDArray[np.int64]
    starts_I: NDArray[np.int64]

    @classmethod
    def of(cls, titles: pl.Series) -> "Titles":
        """Read every title."""
        years = [float(found[1]) if (found := YEAR.search(title)) else np.nan for title in titles]
        words = [sorted(set(WORD.findall(YEAR.sub("", title).lower()))) for title in titles]
        common = Counter(word for title in words for word in title).most_common(AFFINITY_WORDS)
        codes = {word: code for code, (word, items) in enumerate(common) if items > 1}
        coded = [[codes[word] for word in title if word in codes] for title in words]
        features_IF = np.zeros((len(years), 1 + min(WORDS, len(codes))), np.float32)
        features_IF[:, 0] = years
        for row, title in enumerate(coded):
            features_IF[row, [1 + code for code in title if code < WORDS]] = 1
        starts_I = np.concatenate([[0], np.cumsum([len(title) for title in coded])]).astype(np.int64)
        return cls(features_IF, np.array([code for title in coded for code in title], np.int64), starts_I)

    def pairs(self, item_B: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the (row, word) pairs of rows with these items."""
        words_B = np.diff(self.starts_I)[item_B]
        row_P = np.repeat(np.arange(len(item_B)), words_B)
        within_P = np.arange(len(row_P)) - np.repeat(np.cumsum(words_B) - words_B, words_B)
        return row_P, self.words_W[self.starts_I[item_B][row_P] + within_P]


@dataclass(frozen=True)
class Boosting:
    """Gradient boosting on counts, history length, year, title words, and how the user liked titles with these words.

    It is fitted on rows of train, each with the counts strictly before it. A higher rate never lowers a score.
    """

    trees: HistGradientBoostingClassifier
    rates: Rates
    titles: Titles

    @classmethod
    def fit(cls, dataset: Dataset, histories: Histories, rates: Rates, seed: int = 0) -> "Boosting | None":
        """Return the model fitted on the train split; None if train has only one class."""
        train = dataset.splits["train"]
        labels_N = train["label"].to_numpy()
        latest_N = np.argsort(train["timestamp"].to_numpy(), kind="stable")[-MAX_ROWS:]
        if len(np.unique(labels_N[latest_N])) < 2:
            return None
        titles = Titles.of(dataset.items["title"])
        features_NF = _features(dataset, histories, "train", LIVE, row_counts(dataset, "train", LIVE), rates, titles)
        # No title of train may have a year; the trees cannot bin a feature without any value.
        features_NF[:, np.isnan(features_NF[latest_N]).all(axis=0)] = 0.0
        trees = HistGradientBoostingClassifier(
            max_iter=50,
            learning_rate=0.05,
            max_leaf_nodes=7,
            min_samples_leaf=50,
            l2_regularization=10.0,
            early_stopping=False,
            monotonic_cst=[1] * RATES + [0] * (features_NF.shape[1] - RATES),
            random_state=seed,
        )
        # Several threads add gradients in a random order. The report is part of the bundle's id, so use one thread.
        with threadpool_limits(1, "openmp"):
            trees.fit(features_NF[latest_N], labels_N[latest_N], train["weight"].to_numpy()[latest_N])
        return cls(trees, rates, titles)

    def scores(
        self, dataset: Dataset, histories: Histories, split: str, counting: Counting, counts: RowCounts
    ) -> Floats:
        """Return the probabilities of a split's rows, `(B,)`, from the counts known at each row."""
        features_BF = _features(dataset, histories, split, counting, counts, self.rates, self.titles)
        parts = [
            self.trees.predict_proba(features_BF[start : start + ROWS_AT_ONCE])[:, 1]
            for start in range(0, len(features_BF), ROWS_AT_ONCE)
        ]
        return np.concatenate([np.zeros(0), *parts]).astype(np.float32)


def _features(
    dataset: Dataset,
    histories: Histories,
    split: str,
    counting: Counting,
    counts: RowCounts,
    rates: Rates,
    titles: Titles,
) -> Floats:
    """Return a split's features, `(B, F)`; the first `RATES` are rates."""
    shown, liked = _affinity(dataset, histories, split, counting, titles)
    known = [
        rates.distance(counts.user_positives_B, counts.user_impressions_B, rates.user_strength),
        rates.distance(counts.item_positives_B, counts.item_impressions_B, rates.item_strength),
        rates.distance(liked, shown, rates.item_strength),
        np.log1p(counts.user_impressions_B),
        np.log1p(counts.item_impressions_B),
        np.log1p(shown),
        histories.of_split(split).length,
    ]
    features = [one.astype(np.float32) for one in known]
    return np.column_stack([*features, titles.features_IF[histories.item_rows(split)]])


def _affinity(
    dataset: Dataset, histories: Histories, split: str, counting: Counting, titles: Titles
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each row's earlier rows and positives of the user with a word of the title, summed over its words."""
    splits, before_B = counting.known(dataset, split)
    pairs = {name: titles.pairs(histories.item_rows(name)) for name in {*splits, split}}

    def keys(name: str) -> NDArray[np.int64]:
        row_P, word_P = pairs[name]
        return histories.of_split(name).user_code[row_P].astype(np.int64) * AFFINITY_WORDS + word_P

    nothing = np.zeros(0, np.int64)
    labels = [dataset.splits[name]["label"].to_numpy()[pairs[name][0]] for name in splits]
    times = [dataset.splits[name]["timestamp"].cast(pl.Float64).to_numpy()[pairs[name][0]] for name in splits]
    row_P = pairs[split][0]
    shown_P, liked_P = counted_before(
        np.concatenate([nothing, *map(keys, splits)]),
        np.concatenate([nothing, *labels]),
        np.concatenate([np.zeros(0), *times]),
        keys(split),
        before_B[row_P],
    )
    rows = len(before_B)
    shown_B, liked_B = (np.bincount(row_P, weights=one, minlength=rows) for one in (shown_P, liked_P))
    return shown_B.astype(np.int64), liked_B.astype(np.int64)
