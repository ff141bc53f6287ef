"""A made-up catalogue and its clicks, with a structure planted that a good method finds.

Users and items belong to taste clusters (genres). A click is a coin thrown with the planted probability

    p(user, item) = sigmoid(taste[user, genre[item]] + appeal[item] + leniency[user] + offset)

so that the best possible AUC is known, popularity alone reaches part of it, and an item's title, made of its genre's
words, tells of a cold item what its clicks cannot. `films.py` draws its clicks here too; its films have traits of
several genres and an era.

Shapes: U users, I items, G genres, T traits, B rows. Warm users and items come before cold ones.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from training.data.fictional_titles import GENRES, invent_titles
from training.data.folder import write_folder
from training.data.split import SPLITS

Floats = NDArray[np.float64]

# 2023-01-01T00:00:00Z: any fixed moment would do.
FIRST_SECOND = 1_672_531_200
SECONDS_A_DAY = 86_400


class SyntheticConfig(BaseModel):
    """Sizes and strengths; the defaults give a demo that trains in minutes and still tells methods apart."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    users: int = Field(default=300, ge=2)
    items: int = Field(default=400, ge=2)
    # About 40 rows a user, as in MovieLens-1M's split: enough for a history of ten and for a user's vector.
    train_rows: int = Field(default=12_000, ge=1)
    valid_rows: int = Field(default=2_000, ge=1)
    test_rows: int = Field(default=2_000, ge=1)
    genres: int = Field(default=len(GENRES), ge=2, le=len(GENRES))
    # Shares that appear in valid and test only.
    cold_users: float = Field(default=0.1, ge=0, le=0.5)
    cold_items: float = Field(default=0.1, ge=0, le=0.5)
    # New releases are shown more than older items: otherwise a small data set has too few cold rows to measure.
    release_boost: float = Field(default=1.5, gt=0)
    # Spreads in logits. Taste outweighs the rest, so that a method without it is clearly worse.
    taste: float = Field(default=2.6, ge=0)
    appeal: float = Field(default=0.9, ge=0)
    leniency: float = Field(default=0.7, ge=0)
    # Below zero: a little under half of the clicks are positive, as with MovieLens' threshold.
    offset: float = -0.2
    train_days: int = Field(default=300, ge=1)
    valid_days: int = Field(default=30, ge=1)
    test_days: int = Field(default=30, ge=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _room(self) -> Self:
        """Check that every split has room: nobody sees an item twice."""
        warm_pairs = self.warm_users * self.warm_items
        if self.train_rows > warm_pairs // 2:
            raise ValueError(f"train_rows {self.train_rows} exceed half of the {warm_pairs} warm pairs; lower them")
        if self.train_rows + self.valid_rows + self.test_rows > self.users * self.items // 2:
            raise ValueError("rows exceed half of all pairs of users and items; lower them")
        return self

    @property
    def warm_users(self) -> int:
        """How many users appear in train."""
        return self.users - round(self.users * self.cold_users)

    @property
    def warm_items(self) -> int:
        """How many items may appear in train."""
        return self.items - round(self.items * self.cold_items)

    def rows(self, split: str) -> int:
        """Return how many rows a split gets."""
        return {"train": self.train_rows, "valid": self.valid_rows, "test": self.test_rows}[split]


@dataclass(frozen=True)
class World:
    """What is planted: the truth behind the clicks.

    Attributes:
        trait_IT: how much of each trait an item has; in the synthetic catalogue 1 for its genre and 0 elsewhere.
        taste_UT: a user's taste for each trait, in logits.
    """

    user_ids: list[str]
    item_ids: list[str]
    titles: list[str]
    trait_IT: Floats
    taste_UT: Floats
    appeal_I: Floats
    leniency_U: Floats
    offset: float

    def probability(self, user: NDArray[np.int64], item: NDArray[np.int64]) -> Floats:
        """Return the planted probability of a click for pairs of indices, broadcast against each other."""
        taste = (self.taste_UT[user] * self.trait_IT[item]).sum(axis=-1)
        logit = taste + self.appeal_I[item] + self.leniency_U[user]
        return np.asarray(1 / (1 + np.exp(-(logit + self.offset))))


def plant(config: SyntheticConfig) -> World:
    """Return the world of a configuration; the same for the same configuration."""
    rng = np.random.default_rng([config.seed, 0])
    genre_I = rng.permutation(np.arange(config.items) % config.genres)
    # A user likes about a third of the genres and is cool to the rest. The mean over genres is zero: how easily a
    # user is pleased at all is leniency, not taste.
    liked_UG = rng.permuted(np.tile(np.arange(config.genres), (config.users, 1)), axis=1)
    taste_UG = np.where(liked_UG < max(1, config.genres // 3), 1.0, -0.5) + rng.normal(
        0, 0.25, (config.users, config.genres)
    )
    taste_UG = config.taste * (taste_UG - taste_UG.mean(axis=1, keepdims=True))
    return World(
        user_ids=numbered("u", config.users),
        item_ids=numbered("m", config.items),
        titles=invent_titles(genre_I, rng),
        trait_IT=np.eye(config.genres)[genre_I],
        taste_UT=taste_UG,
        appeal_I=rng.normal(0, config.appeal, config.items),
        leniency_U=rng.normal(0, config.leniency, config.users),
        offset=config.offset,
    )


def planted_probability(config: SyntheticConfig, rows: pl.DataFrame) -> Floats:
    """Return the planted probability of a click for rows with `user_id` and `item_id`: [B].

    No method can expect a better AUC than these reach.
    """
    return plant(config).probability(*indices(rows))


def indices(rows: pl.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of the users and of the items of rows: [B] each."""
    user, item = (
        np.array([int(one[1:]) for one in rows[column]], dtype=np.int64) - 1 for column in ("user_id", "item_id")
    )
    return user, item


def write_synthetic(out: Path, config: SyntheticConfig) -> None:
    """Write items, train, valid and test as parquet; byte for byte the same rows for the same configuration.

    Raises:
        DataError: the folder cannot be written or holds other tables.
    """
    write_folder(out, draw_tables(config))


def draw_tables(config: SyntheticConfig) -> dict[str, pl.DataFrame]:
    """Return items, train, valid and test; the same for the same configuration."""
    world = plant(config)
    items = pl.DataFrame({"item_id": world.item_ids, "title": world.titles})
    return {"items": items, **draw_splits(config, world)}


def draw_splits(config: SyntheticConfig, world: World) -> dict[str, pl.DataFrame]:
    """Return train, valid and test: clicks drawn with a world's probabilities, in time order."""
    rng = np.random.default_rng([config.seed, 1])
    activity_U = rng.lognormal(0, 0.6, config.users)
    # What is liked is also shown more, and some of it for no reason: exposure is a hint, not the answer.
    exposure_I = 0.8 * world.appeal_I / max(config.appeal, 1e-9) + rng.normal(0, 0.5, config.items)
    exposure_I[config.warm_items :] += np.log(config.release_boost)
    seen_UI = np.zeros((config.users, config.items), dtype=bool)
    start = FIRST_SECOND
    splits = {}
    for split, days in zip(SPLITS, (config.train_days, config.valid_days, config.test_days), strict=True):
        users, items = (config.warm_users, config.warm_items) if split == "train" else (config.users, config.items)
        end = start + days * SECONDS_A_DAY
        user, item = _draw_pairs(config.rows(split), activity_U[:users], exposure_I[:items], seen_UI, rng)
        label = rng.random(len(user)) < world.probability(user, item)
        splits[split] = pl.DataFrame(
            {
                "user_id": np.array(world.user_ids)[user],
                "item_id": np.array(world.item_ids)[item],
                "label": label.astype(np.int8),
                "timestamp": _draw_moments(start, end, user, rng),
            }
        ).sort("timestamp", maintain_order=True)
        start = end
    return splits


def _draw_moments(start: int, end: int, user: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return a second for each row, [B]; no user has two rows in one second, so each user's order is defined."""
    moment = rng.integers(start, end, len(user))
    while (shared := pl.DataFrame({"user": user, "moment": moment}).is_duplicated().to_numpy()).any():
        moment[shared] = rng.integers(start, end, int(shared.sum()))
    return moment


def _draw_pairs(
    rows: int, activity_U: Floats, exposure_I: Floats, seen_UI: NDArray[np.bool_], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return users and items [B], no pair twice; marks them as seen."""
    items = len(exposure_I)
    unseen_U = items - seen_UI[: len(activity_U), :items].sum(axis=1)
    count_U = _share_rows(rows, activity_U, unseen_U, rng)
    drawn = []
    for user, count in enumerate(count_U):
        # The largest of weights plus Gumbel noise are a draw without replacement in proportion to exp(weight).
        noisy = np.where(seen_UI[user, :items], -np.inf, exposure_I + rng.gumbel(size=items))
        item = np.argsort(-noisy)[:count]
        seen_UI[user, item] = True
        drawn.append(item)
    return np.repeat(np.arange(len(count_U)), count_U), np.concatenate(drawn)


def _share_rows(
    rows: int, activity_U: Floats, room_U: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return how many rows each user gets: in proportion to activity, never more than there is room for."""
    count_U = np.zeros(len(activity_U), dtype=np.int64)
    while (missing := rows - count_U.sum()) > 0:
        weight_U = np.where(count_U < room_U, activity_U, 0)
        count_U = np.minimum(count_U + rng.multinomial(missing, weight_U / weight_U.sum()), room_U)
    return count_U


def numbered(prefix: str, count: int) -> list[str]:
    """Return ids from 1 on, padded to equal length: u001 to u300."""
    width = len(str(count))
    return [f"{prefix}{number:0{width}d}" for number in range(1, count + 1)]
