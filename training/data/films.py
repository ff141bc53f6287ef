"""The demo's data: real films and generated clicks, which a language model that knows films can predict.

Titles, years and genres are facts (`films.csv`); users and clicks are drawn at random. A click is drawn with the
probability of `synthetic.py`, where tastes are tastes for genres and for eras:

    p(user, film) = sigmoid(taste[user] . traits[film] + appeal[film] + leniency[user] + offset)

The title that training reads has the year and not the genre ("The Matrix (1999)"). So only a model that knows a film
knows the genre of a film that nobody has clicked. Appeal is drawn at random, and no title shows it.

Shapes: U users, I films, G genres, E eras, T = G + E traits, B rows. Warm users and films come before new ones.
"""

from functools import cache
from importlib import resources
from typing import Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, model_validator

from training.data.synthetic import Floats, SyntheticConfig, World, draw_splits, indices, numbered

# The genres form a ring: a user who likes a genre likes its neighbours and dislikes the genres on the opposite side. A
# dozen clicks show such a taste, and clicks on one genre say something about other genres, as with real people.
GENRES = (
    *("Action", "War", "Western", "Crime", "Drama", "Romance"),
    *("Musical", "Comedy", "Animation", "Fantasy", "Science Fiction", "Horror"),
)
# First years of the eras after the first: sound to colour, New Hollywood, the blockbuster, digital film.
ERA_STARTS = (1965, 1985, 2000)
# The share of a film's second genre; the first genre has the rest.
SECOND_GENRE = 0.3


@cache
def read_films() -> pl.DataFrame:
    """Return the films that come with sella: `title` (without the year), `year`, `genres` (one or two)."""
    file = resources.files("training") / "data" / "films.csv"
    films = pl.read_csv(file.read_bytes(), schema={"title": pl.String, "year": pl.Int64, "genres": pl.String})
    return films.with_columns(pl.col("genres").str.split("|"))


class FilmsConfig(SyntheticConfig):
    """Sizes and strengths of the demo: 16,000 train rows, which train in minutes; `items` films of the catalogue."""

    users: int = Field(default=500, ge=2)
    items: int = Field(default_factory=lambda: read_films().height, ge=2)
    train_rows: int = Field(default=16_000, ge=1)
    # A language model of 135 M parameters scores some forty rows a second on two cores.
    valid_rows: int = Field(default=800, ge=1)
    test_rows: int = Field(default=1_200, ge=1)
    genres: int = Field(default=len(GENRES), ge=2)
    # A few hundred rows of new films in valid and in test: enough to tell an AUC of 0.60 from chance.
    cold_items: float = Field(default=0.13, ge=0, le=0.5)
    release_boost: float = Field(default=2.0, gt=0)
    # Taste counts more than the rest: no title shows the appeal, and popularity alone has a low AUC.
    taste: float = Field(default=2.2, ge=0)
    era: float = Field(default=0.4, ge=0)
    appeal: float = Field(default=0.6, ge=0)
    leniency: float = Field(default=0.4, ge=0)
    offset: float = -0.3

    @model_validator(mode="after")
    def _films_are_there(self) -> Self:
        """Check that the catalogue has this many films and genres."""
        if self.items > read_films().height:
            raise ValueError(f"items {self.items} exceed the {read_films().height} films of the catalogue; lower them")
        if self.genres != len(GENRES):
            raise ValueError(f"genres {self.genres} are not the {len(GENRES)} of the catalogue; leave them out")
        return self


def draw_film_tables(config: FilmsConfig) -> dict[str, pl.DataFrame]:
    """Return items, train, valid and test; equal configurations give equal tables.

    `items` has `genre` beside `item_id` and `title`, for people to read: training ignores it.
    """
    films, world = _shuffled(config), plant_films(config)
    genre = films["genres"].list.join(", ")
    items = pl.DataFrame({"item_id": world.item_ids, "title": world.titles, "genre": genre})
    return {"items": items, **draw_splits(config, world)}


def plant_films(config: FilmsConfig) -> World:
    """Return the world of a configuration; equal configurations give equal worlds."""
    films = _shuffled(config)
    rng = np.random.default_rng([config.seed, 0])
    return World(
        user_ids=numbered("u", config.users),
        item_ids=numbered("m", config.items),
        titles=(films["title"] + " (" + films["year"].cast(pl.String) + ")").to_list(),
        trait_IT=_traits(films),
        taste_UT=np.hstack([config.taste * _genre_tastes(config, rng), config.era * _era_tastes(config, rng)]),
        appeal_I=rng.normal(0, config.appeal, config.items),
        leniency_U=rng.normal(0, config.leniency, config.users),
        offset=config.offset,
    )


def planted_film_probability(config: FilmsConfig, rows: pl.DataFrame) -> Floats:
    """Return the planted probability of a click for rows with `user_id` and `item_id`: [B]."""
    return plant_films(config).probability(*indices(rows))


def popularity(train: pl.DataFrame, rows: pl.DataFrame) -> Floats:
    """Return for each row the share of positives of its film in train, smoothed by four clicks at one half: [B]."""
    rates = train.group_by("item_id").agg(((pl.col("label").sum() + 2) / (pl.len() + 4)).alias("rate"))
    return rows.join(rates, on="item_id", how="left", maintain_order="left")["rate"].fill_null(0.5).to_numpy()


def on_new_films(config: FilmsConfig, rows: pl.DataFrame) -> NDArray[np.bool_]:
    """Return which rows are of a film that has no row in train: [B]."""
    _, item = indices(rows)
    return item >= config.warm_items


def _shuffled(config: FilmsConfig) -> pl.DataFrame:
    """Return the films in the order of their ids; the order is random, so that any film may be a new one."""
    order = np.random.default_rng([config.seed, 2]).permutation(read_films().height)
    return read_films()[order[: config.items]]


def _traits(films: pl.DataFrame) -> Floats:
    """Return how much of each genre and era each film has: [I, T]."""
    place = {name: number for number, name in enumerate(GENRES)}
    genre_IG = np.zeros((films.height, len(place)))
    for film, (first, *second) in enumerate(films["genres"]):
        genre_IG[film, place[first]] = 1 - SECOND_GENRE * len(second)
        for name in second:
            genre_IG[film, place[name]] = SECOND_GENRE
    era_I = np.searchsorted(ERA_STARTS, films["year"].to_numpy(), side="right")
    return np.hstack([genre_IG, np.eye(len(ERA_STARTS) + 1)[era_I]])


def _genre_tastes(config: FilmsConfig, rng: np.random.Generator) -> Floats:
    """Return each user's taste for each genre, [U, G]: high for two or three neighbours, low for the opposite side."""
    genre_G = 2 * np.pi * np.arange(config.genres) / config.genres
    user_U1 = rng.uniform(0, 2 * np.pi, (config.users, 1))
    taste_UG = np.cos(genre_G - user_U1) + rng.normal(0, 0.25, (config.users, config.genres))
    # The mean is removed: how much a user likes all films is leniency, not taste.
    return np.asarray(taste_UG - taste_UG.mean(axis=1, keepdims=True))


def _era_tastes(config: FilmsConfig, rng: np.random.Generator) -> Floats:
    """Return each user's taste for each era, [U, E]: each user prefers one era."""
    eras = len(ERA_STARTS) + 1
    return np.asarray(np.eye(eras)[rng.integers(0, eras, config.users)] - 1 / eras)
