from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score

from training.data.dataset import Dataset, load_dataset
from training.data.films import (
    GENRES,
    FilmsConfig,
    draw_film_tables,
    on_new_films,
    plant_films,
    planted_film_probability,
    popularity,
    read_films,
)
from training.data.folder import write_folder
from training.data.synthetic import indices

CONFIG = FilmsConfig(valid_rows=2_000, test_rows=2_000)  # enough rows of new films to tell AUCs apart
LATER = ["valid", "test"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = tmp_path_factory.mktemp("films")
    write_folder(out, draw_film_tables(CONFIG))
    return load_dataset(out)


def auc(rows: pl.DataFrame, score: NDArray[np.float64], chosen: NDArray[np.bool_] | None = None) -> float:
    labels = rows["label"].to_numpy()
    return float(roc_auc_score(labels, score) if chosen is None else roc_auc_score(labels[chosen], score[chosen]))


def test_the_catalogue_is_of_distinct_films_with_a_year_and_one_or_two_known_genres() -> None:
    films = read_films()
    assert films.height >= 580
    assert films.select("title", "year").is_duplicated().sum() == 0
    # One title is one film: "Scarface" of two years would be told apart by the year alone.
    assert films["title"].str.to_lowercase().is_duplicated().sum() == 0
    assert films["year"].is_between(1930, 2023).all()
    for title, genres in films.select("title", "genres").iter_rows():
        assert title == " ".join(title.split()) and not title.endswith(")"), title
        assert 1 <= len(genres) == len(set(genres)) <= 2 and set(genres) <= set(GENRES), title


def test_the_genres_are_balanced() -> None:
    first = Counter(read_films()["genres"].list.first())
    assert set(first) == set(GENRES)
    assert max(first.values()) <= 1.1 * min(first.values())


def test_a_title_holds_its_year_and_training_never_sees_the_genre(dataset: Dataset) -> None:
    written = draw_film_tables(CONFIG)["items"]
    assert dataset.items.columns == ["item_id", "title"] and dataset.titles_cleaned == 0
    [(title, genre)] = (
        written.filter(pl.col("title").str.starts_with("The Matrix")).select("title", "genre").iter_rows()
    )
    assert (title, genre) == ("The Matrix (1999)", "Science Fiction, Action")
    # Few titles contain the name of a genre.
    assert sum(not set(title.split()).isdisjoint(GENRES) for title in written["title"]) <= 5


@pytest.mark.parametrize("split", LATER)
def test_tastes_separate_well_and_popularity_alone_clearly_less(dataset: Dataset, split: str) -> None:
    rows = dataset.splits[split]
    best = auc(rows, planted_film_probability(CONFIG, rows))
    assert 0.8 < best < 0.9
    assert 0.52 < auc(rows, popularity(dataset.splits["train"], rows)) < best - 0.2


@pytest.mark.parametrize("split", LATER)
def test_on_new_films_the_genre_tells_most_and_clicks_and_words_nothing(dataset: Dataset, split: str) -> None:
    train, rows = dataset.splits["train"], dataset.splits[split]
    new, world = on_new_films(CONFIG, rows), plant_films(CONFIG)
    assert set(rows["item_id"].filter(pl.Series(new))).isdisjoint(train["item_id"])
    assert new.sum() > 400
    by_genre = replace(world, appeal_I=np.zeros(CONFIG.items), leniency_U=np.zeros(CONFIG.users))
    assert auc(rows, by_genre.probability(*indices(rows)), new) > 0.75
    assert auc(rows, popularity(train, rows), new) == 0.5
    # A user's rate in the film's decade: a model without knowledge reads nothing else in a title of unknown words.
    decade = pl.col("title").str.extract(r"\((\d{3})\d\)$")
    dated = dataset.items.with_columns(decade.alias("decade"))
    rates = (
        train.join(dated, on="item_id")
        .group_by("user_id", "decade")
        .agg(((pl.col("label").sum() + 2) / (pl.len() + 4)).alias("rate"))
    )
    joined = rows.join(dated, on="item_id", maintain_order="left").join(
        rates, on=["user_id", "decade"], how="left", maintain_order="left"
    )
    assert auc(rows, joined["rate"].fill_null(0.5).to_numpy(), new) < 0.6


def test_a_user_likes_neighbouring_genres_and_dislikes_those_across() -> None:
    taste_UG = plant_films(CONFIG).taste_UT[:, : len(GENRES)]
    np.testing.assert_allclose(taste_UG.mean(axis=1), 0, atol=1e-12)
    near, across = (
        np.mean([np.corrcoef(taste_UG[:, one], taste_UG[:, (one + step) % 12])[0, 1] for one in range(12)])
        for step in (1, 6)
    )
    assert near > 0.6 and across < -0.6
    assert ((taste_UG > CONFIG.taste / 2).sum(axis=1) >= 1).all()
    assert ((taste_UG < -CONFIG.taste / 2).sum(axis=1) >= 1).all()


def test_a_films_traits_are_its_genres_and_its_era() -> None:
    world = plant_films(CONFIG)
    traits = dict(zip(world.titles, world.trait_IT, strict=True))
    expected = np.zeros(len(GENRES) + 4)
    expected[[GENRES.index("Romance"), GENRES.index("War"), len(GENRES)]] = [0.7, 0.3, 1]
    np.testing.assert_allclose(traits["Casablanca (1942)"], expected)
    expected = np.zeros(len(GENRES) + 4)
    expected[[GENRES.index("Horror"), len(GENRES) + 3]] = 1
    np.testing.assert_allclose(traits["Saw (2004)"], expected)


def test_labels_are_thrown_with_the_planted_probability(dataset: Dataset) -> None:
    rows = pl.concat(dataset.splits.values())
    probability, labels = planted_film_probability(CONFIG, rows), rows["label"].to_numpy()
    for low in np.arange(0, 1, 0.2):
        part = (probability >= low) & (probability < low + 0.2)
        spread = np.sqrt((probability[part] * (1 - probability[part])).sum()) / part.sum()
        assert abs(labels[part].mean() - probability[part].mean()) < 4 * spread


def test_new_films_and_new_users_come_after_train_alone(dataset: Dataset) -> None:
    world = plant_films(CONFIG)
    for column, ids, warm in (
        ("user_id", world.user_ids, CONFIG.warm_users),
        ("item_id", world.item_ids, CONFIG.warm_items),
    ):
        assert 0.09 < 1 - warm / len(ids) < 0.16
        assert set(dataset.splits["train"][column]) == set(ids[:warm])
        for split in LATER:
            assert len(set(dataset.splits[split][column]) & set(ids[warm:])) > 0.75 * len(ids[warm:])


def test_splits_follow_each_other_in_time_and_a_user_has_one_row_a_second(dataset: Dataset) -> None:
    assert [frame.height for frame in dataset.splits.values()] == [16_000, 2_000, 2_000]
    assert all(frame["timestamp"].is_sorted() for frame in dataset.splits.values())
    bounds = [(frame["timestamp"][0], frame["timestamp"][-1]) for frame in dataset.splits.values()]
    assert bounds[0][1] < bounds[1][0] <= bounds[1][1] < bounds[2][0]
    rows = pl.concat(dataset.splits.values())
    assert rows.select("user_id", "item_id").is_duplicated().sum() == 0
    crowded = FilmsConfig(users=100, train_rows=20_000, valid_rows=1, test_rows=1, train_days=1)
    for frame in (rows, draw_film_tables(crowded)["train"]):
        assert frame.select("user_id", "timestamp").is_duplicated().sum() == 0


def test_a_seed_gives_the_same_tables_and_another_seed_other_people_and_other_new_films() -> None:
    small = {"users": 40, "train_rows": 400, "valid_rows": 50, "test_rows": 50}
    first, same, other = (draw_film_tables(FilmsConfig(**small, seed=seed)) for seed in (1, 1, 2))
    assert all(first[name].equals(same[name]) for name in first)
    assert not any(first[name].equals(other[name]) for name in first)
    assert set(first["items"]["title"]) == set(other["items"]["title"])


@pytest.mark.parametrize("wrong", [{"items": 5000}, {"genres": 11}, {"users": 1}, {"train_rows": 10**6}])
def test_sizes_that_do_not_fit_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        FilmsConfig.model_validate(wrong)


def test_the_catalogue_is_part_of_the_package() -> None:
    import tomllib

    root = Path(__file__).parents[3]
    packaged = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["training"]
    assert (root / "training" / "data" / "films.csv").is_file() and "data/films.csv" in packaged
