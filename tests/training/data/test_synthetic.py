from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score

from training.data.dataset import Dataset, load_dataset
from training.data.fictional_titles import GENRES
from training.data.synthetic import SyntheticConfig, draw_tables, plant, planted_probability, write_synthetic

CONFIG = SyntheticConfig()
LATER = ["valid", "test"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = tmp_path_factory.mktemp("synthetic")
    write_synthetic(out, CONFIG)
    return load_dataset(out)


def auc(rows: pl.DataFrame, score: NDArray[np.float64]) -> float:
    return float(roc_auc_score(rows["label"].to_numpy(), score))


def smoothed_rate(train: pl.DataFrame, rows: pl.DataFrame, keys: list[str]) -> NDArray[np.float64]:
    """Return for each row the share of train's positives among rows with the same keys."""
    rates = train.group_by(keys).agg(((pl.col("label").sum() + 2) / (pl.len() + 4)).alias("rate"))
    joined = rows.join(rates, on=keys, how="left", maintain_order="left")
    return joined["rate"].fill_null(0.5).to_numpy()


def genre_by_words(titles: pl.Series) -> list[int]:
    """Return the genre whose words a title holds, from the title alone."""
    return [
        int(np.argmax([len(set(title.split()) & {*genre.adjectives, *genre.nouns}) for genre in GENRES]))
        for title in titles
    ]


@pytest.mark.parametrize("split", LATER)
def test_structure_separates_well_and_popularity_alone_clearly_less(dataset: Dataset, split: str) -> None:
    train, rows = dataset.splits["train"], dataset.splits[split]
    genres = pl.DataFrame({"item_id": dataset.items["item_id"], "genre": genre_by_words(dataset.items["title"])})
    by_taste = smoothed_rate(
        train.join(genres, on="item_id"), rows.join(genres, on="item_id", maintain_order="left"), ["user_id", "genre"]
    )
    best = auc(rows, planted_probability(CONFIG, rows))
    popularity = auc(rows, smoothed_rate(train, rows, ["item_id"]))
    assert best >= 0.8
    assert 0.55 < popularity < best - 0.15
    # What can be learned from train alone lies well above popularity.
    assert popularity + 0.1 < auc(rows, by_taste) < best


def test_cold_items_are_predicted_from_the_words_of_their_titles(dataset: Dataset) -> None:
    train = dataset.splits["train"]
    genres = pl.DataFrame({"item_id": dataset.items["item_id"], "genre": genre_by_words(dataset.items["title"])})
    later = pl.concat([dataset.splits[split] for split in LATER])
    cold = later.join(train, on="item_id", how="anti").join(train, on="user_id", how="semi")
    assert cold.height > 300
    by_words = smoothed_rate(
        train.join(genres, on="item_id"), cold.join(genres, on="item_id", maintain_order="left"), ["user_id", "genre"]
    )
    assert auc(cold, by_words) > 0.7
    assert auc(cold, smoothed_rate(train, cold, ["item_id"])) == 0.5


def test_cold_users_and_items_appear_only_in_valid_and_test(dataset: Dataset) -> None:
    world = plant(CONFIG)
    for column, ids, warm in (("user_id", world.user_ids, 270), ("item_id", world.item_ids, 360)):
        assert set(dataset.splits["train"][column]) == set(ids[:warm])
        for split in LATER:
            cold = set(dataset.splits[split][column]) & set(ids[warm:])
            assert len(cold) > 0.8 * len(ids[warm:])


def test_taste_orders_the_genres_of_a_user_and_says_nothing_of_how_easily_one_is_pleased() -> None:
    world = plant(CONFIG)
    np.testing.assert_allclose(world.taste_UT.mean(axis=1), 0, atol=1e-12)
    assert (world.taste_UT.max(axis=1) > 1).all()


def test_labels_are_thrown_with_the_planted_probability(dataset: Dataset) -> None:
    rows = pl.concat(dataset.splits.values())
    probability = planted_probability(CONFIG, rows)
    labels = rows["label"].to_numpy()
    for low in np.arange(0, 1, 0.2):
        part = (probability >= low) & (probability < low + 0.2)
        spread = np.sqrt((probability[part] * (1 - probability[part])).sum()) / part.sum()
        assert abs(labels[part].mean() - probability[part].mean()) < 4 * spread


def test_splits_follow_each_other_in_time_and_nobody_meets_an_item_twice(dataset: Dataset) -> None:
    assert [frame.height for frame in dataset.splits.values()] == [12_000, 2_000, 2_000]
    assert all(frame["timestamp"].is_sorted() for frame in dataset.splits.values())
    bounds = [(frame["timestamp"][0], frame["timestamp"][-1]) for frame in dataset.splits.values()]
    assert bounds[0][1] < bounds[1][0] <= bounds[1][1] < bounds[2][0]
    pairs = pl.concat(dataset.splits.values()).select("user_id", "item_id")
    assert pairs.is_duplicated().sum() == 0


def test_titles_are_unique_and_no_word_stands_in_two_genres(dataset: Dataset) -> None:
    assert dataset.items["title"].n_unique() == dataset.items.height
    assert dataset.titles_cleaned == 0
    words = [word for genre in GENRES for word in (*genre.adjectives, *genre.nouns)]
    assert len(words) == len(set(words))
    assert genre_by_words(dataset.items["title"]) == plant(CONFIG).trait_IT.argmax(axis=1).tolist()


def test_a_seed_gives_the_same_tables_and_another_seed_others() -> None:
    small = {"users": 20, "items": 30, "train_rows": 100, "valid_rows": 20, "test_rows": 20}
    first, same, other = (draw_tables(SyntheticConfig(**small, seed=seed)) for seed in (1, 1, 2))
    assert all(first[name].equals(same[name]) for name in first)
    assert not any(first[name].equals(other[name]) for name in ("items", "train"))


def test_small_worlds_are_filled_to_the_row() -> None:
    tight = SyntheticConfig(users=6, items=10, train_rows=20, valid_rows=5, test_rows=5, genres=2)
    assert [draw_tables(tight)[split].height for split in ("train", "valid", "test")] == [20, 5, 5]


@pytest.mark.parametrize("wrong", [{"train_rows": 60_000}, {"users": 1}, {"test_rows": 60_000}, {"colour": "red"}])
def test_sizes_that_do_not_fit_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SyntheticConfig.model_validate(wrong)


def test_nothing_is_written_beside_the_four_tables(tmp_path: Path) -> None:
    write_synthetic(tmp_path, SyntheticConfig(users=6, items=10, train_rows=20, valid_rows=5, test_rows=5))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "items.parquet",
        "test.parquet",
        "train.parquet",
        "valid.parquet",
    ]
