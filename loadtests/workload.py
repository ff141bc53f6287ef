"""The requests that load is made of: drawn from a bundle's own users and items, the same for the same seed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator


class Mix(BaseModel):
    """What the requests are like; frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    zipf: float = Field(
        default=1.1, ge=0, description="Exponent of the users' popularity; 0 is uniform, web traffic lies around 1."
    )
    rank_share: float = Field(default=0.7, ge=0, le=1, description="Share of /rank; the others are /score.")
    sizes: tuple[int, ...] = Field(default=(1, 10, 100), min_length=1, description="Candidates or pairs of a request.")
    size_weights: tuple[float, ...] = Field(
        default=(0.4, 0.4, 0.2), description="How often each size is drawn: large lists are the rarer ones."
    )
    sent_share: float = Field(default=0.3, ge=0, le=1, description="Share of requests that send a history.")
    longest_history: int = Field(default=30, ge=1, description="A sent history has 1 to this many items.")
    unknown_share: float = Field(
        default=0.01, ge=0, le=1, description="Share of candidates from outside the catalogue, sent with a title."
    )

    @model_validator(mode="after")
    def _weights_fit(self) -> "Mix":
        if len(self.sizes) != len(self.size_weights) or min(self.sizes) < 1 or min(self.size_weights) < 0:
            raise ValueError("sizes and size_weights: give one weight of at least 0 for each size of at least 1")
        if not sum(self.size_weights):
            raise ValueError("size_weights: one of them must be over 0")
        return self


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, ready to send."""

    path: str
    body: bytes
    candidates: int


@dataclass(frozen=True)
class Catalogue:
    """Whom and what requests may name."""

    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    titles: tuple[str, ...]

    @classmethod
    def read(cls, bundle: Path) -> "Catalogue":
        """Read a bundle's users and items.

        Raises:
            FileNotFoundError: the folder is no bundle.
        """
        users = pl.read_parquet(bundle / "users.parquet", columns=["user_id"])
        items = pl.read_parquet(bundle / "items.parquet", columns=["item_id", "title"])
        return cls(tuple(users["user_id"]), tuple(items["item_id"]), tuple(items["title"]))


class Workload:
    """Requests by number. Request `n` depends on the catalogue, the mix, the seed and `n`, and on no other request."""

    def __init__(self, catalogue: Catalogue, mix: Mix | None = None, seed: int = 0) -> None:
        self._catalogue = catalogue
        self._mix = mix or Mix()
        self._seed = seed
        # Who is popular is drawn too, so that popularity does not follow the table's order.
        self._by_popularity = np.random.default_rng(seed).permutation(len(catalogue.user_ids))
        weights = np.arange(1, len(catalogue.user_ids) + 1, dtype=np.float64) ** -self._mix.zipf
        self._cumulative = np.cumsum(weights) / weights.sum()
        sizes = np.asarray(self._mix.size_weights, np.float64)
        self._size_shares = sizes / sizes.sum()

    def ask(self, number: int) -> Ask:
        """Return request `number`."""
        rng = self._rng(number)
        rank = rng.random() < self._mix.rank_share
        size = int(rng.choice(np.asarray(self._mix.sizes), p=self._size_shares))
        body: dict[str, Any] = {"user_id": self._user(rng)}
        if rng.random() < self._mix.sent_share:
            length = int(rng.integers(1, self._mix.longest_history + 1))
            drawn = rng.integers(0, len(self._catalogue.item_ids), length)
            body["history"] = [self._catalogue.item_ids[row] for row in drawn]
        unknown = int((rng.random(size) < self._mix.unknown_share).sum())
        candidates = self._candidates(rng, number, size, unknown)
        return _rank(body, candidates) if rank else _score(body, candidates)

    def asks(self, count: int) -> list[Ask]:
        """Return the first `count` requests, made before the clock runs."""
        return [self.ask(number) for number in range(count)]

    def ranking(self, number: int, size: int) -> Ask:
        """Return a /rank of exactly `size` candidates; those that the catalogue lacks are unknown, with titles."""
        rng = self._rng(number)
        return _rank({"user_id": self._user(rng)}, self._candidates(rng, number, size, 0))

    def _rng(self, number: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, number))

    def _user(self, rng: np.random.Generator) -> str:
        place = min(int(np.searchsorted(self._cumulative, rng.random(), side="right")), len(self._by_popularity) - 1)
        return self._catalogue.user_ids[int(self._by_popularity[place])]

    def _candidates(self, rng: np.random.Generator, number: int, size: int, unknown: int) -> list[str | dict[str, str]]:
        """Draw different items: /rank takes each once."""
        known = min(size - unknown, len(self._catalogue.item_ids))
        rows: NDArray[np.int64] = rng.choice(len(self._catalogue.item_ids), known, replace=False)
        candidates: list[str | dict[str, str]] = [self._catalogue.item_ids[row] for row in rows]
        for place in range(size - known):
            after = self._catalogue.titles[int(rng.integers(0, len(self._catalogue.titles)))]
            candidates.append({"item_id": f"unknown-{number}-{place}", "title": f"After {after}"[:200]})
        return candidates


def _rank(body: dict[str, Any], candidates: list[str | dict[str, str]]) -> Ask:
    return Ask("/rank", _encode({**body, "candidates": candidates}), len(candidates))


def _score(body: dict[str, Any], candidates: list[str | dict[str, str]]) -> Ask:
    pairs = [{**body, **(one if isinstance(one, dict) else {"item_id": one})} for one in candidates]
    return Ask("/score", _encode({"pairs": pairs}), len(candidates))


def _encode(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
