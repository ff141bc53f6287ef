from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from models.fusion import Rates
from training.baselines import WORDS, Boosting, Titles, _affinity, collab_scores, rate_scores
from training.counts import LIVE, STATIC, Counting, RowCounts, row_counts
from training.data.dataset import Dataset, load_dataset
from training.data.history import build_histories
from training.data.synthetic import SyntheticConfig, write_synthetic
from training.fusion import fit_rates


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    write_synthetic(folder, SyntheticConfig())
    return load_dataset(folder)


def test_collab_is_the_inner_product_kept_within_probabilities() -> None:
    users = np.array([[1.0, 0.5], [2.0, 0.0], [-1.0, 0.0]], np.float32)
    items = np.array([[0.2, 0.4], [3.0, 0.0], [3.0, 0.0]], np.float32)
    np.testing.assert_allclose(collab_scores(users, items), [0.4, 0.99, 0.01], atol=1e-6)


def test_rates_add_the_distances_of_user_and_item_to_the_base_rate() -> None:
    counts = RowCounts(*(np.array(one) for one in ([0, 10], [0, 9], [0, 5], [0, 0])))
    rates = Rates(base=0.4, user_strength=10, item_strength=5)
    liked, disliked = np.log((9 + 4) / (1 + 6)), np.log(2 / (5 + 3))
    expected = 1 / (1 + np.exp(-(liked + disliked - np.log(0.4 / 0.6))))
    np.testing.assert_allclose(rate_scores(rates, counts), [0.4, expected], atol=1e-6)


def test_titles_give_the_year_that_ends_them_and_their_words_once() -> None:
    titles = Titles.of(pl.Series(["Heat (1995)", "Heat and Heat", "1984", "A (3000) Year (2001) ", "And (1899)"]))
    np.testing.assert_array_equal(titles.features_IF[:, 0], [1995, np.nan, np.nan, 2001, np.nan])
    row, word = titles.pairs(np.array([1, 4, 2]))
    assert row.tolist() == [0, 0, 1]  # "heat" and "and"; "and"; "1984" stands in one title alone
    assert word[1] != word[0] and word[2] in word[:2]
    assert titles.features_IF[1, 1:].tolist() == [1, 1] and titles.features_IF[4, 1:].sum() == 1
    many = Titles.of(pl.Series([f"word{one // 2}" for one in range(400)]))
    assert many.features_IF.shape == (400, 1 + WORDS) and len(many.words_W) == 400


@pytest.mark.parametrize("counting", [STATIC, LIVE, Counting(live=True, delay=40_000.0)])
def test_affinity_counts_what_the_user_met_of_each_word(synthetic: Dataset, counting: Counting) -> None:
    data = Dataset(synthetic.items, {name: frame.head(600) for name, frame in synthetic.splits.items()})
    titles, histories = Titles.of(data.items["title"]), build_histories(data)
    words = {one: set(titles.pairs(np.array([row]))[1]) for row, one in enumerate(data.items["item_id"])}
    shown_B, liked_B = _affinity(data, histories, "valid", counting, titles)
    splits, before_B = counting.known(data, "valid")
    known = [one for name in splits for one in data.splits[name].iter_rows(named=True)]
    for row, one in list(enumerate(data.splits["valid"].iter_rows(named=True)))[::7]:
        shared = [
            (len(words[one["item_id"]] & words[other["item_id"]]), other["label"])
            for other in known
            if other["user_id"] == one["user_id"] and other["timestamp"] < before_B[row]
        ]
        assert shown_B[row] == sum(number for number, _ in shared)
        assert liked_B[row] == sum(number for number, label in shared if label)
    assert liked_B.sum() > 10


@pytest.mark.parametrize("counting", [STATIC, LIVE])
def test_boosting_is_a_better_first_try_than_rates(synthetic: Dataset, counting: Counting) -> None:
    histories, rates = build_histories(synthetic), fit_rates(synthetic.splits["train"])
    boosting = Boosting.fit(synthetic, histories, rates)
    assert boosting is not None
    counts = row_counts(synthetic, "test", counting)
    labels_B = synthetic.splits["test"]["label"].to_numpy()
    boosted_B = boosting.scores(synthetic, histories, "test", counting, counts)
    assert roc_auc_score(labels_B, boosted_B) > roc_auc_score(labels_B, rate_scores(rates, counts))
    again = Boosting.fit(synthetic, histories, rates)
    assert again is not None
    np.testing.assert_array_equal(again.scores(synthetic, histories, "test", counting, counts), boosted_B)


def test_boosting_learns_from_no_rows_own_label(synthetic: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random labels teach nothing: the probabilities hardly differ. A leaked label would make them differ."""
    rng = np.random.default_rng(0)
    splits = {
        name: frame.with_columns(label=pl.Series(rng.integers(0, 2, frame.height)).cast(pl.Int8))
        for name, frame in synthetic.splits.items()
    }
    shuffled = Dataset(synthetic.items, splits)
    histories, rates = build_histories(shuffled), Rates()

    def spread() -> float:
        boosting = Boosting.fit(shuffled, histories, rates)
        assert boosting is not None
        scores_B = boosting.scores(shuffled, histories, "test", STATIC, row_counts(shuffled, "test", STATIC))
        return float(scores_B.std())

    assert spread() < 0.05
    monkeypatch.setattr("training.baselines.LIVE", Counting(live=True, delay=-1.0))
    assert spread() > 0.1


def test_train_of_one_class_has_no_boosting(synthetic: Dataset, tmp_path: Path) -> None:
    liked = {name: frame.with_columns(label=pl.lit(1, pl.Int8)) for name, frame in synthetic.splits.items()}
    data = Dataset(synthetic.items, liked)
    assert Boosting.fit(data, build_histories(data), Rates()) is None
