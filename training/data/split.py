"""One table of interactions cut by time into train, valid and test."""

from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, Self

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from training.data.errors import DataError, first_problem

SPLITS = ("train", "valid", "test")
# Eight tenths to learn from; valid and test large enough for an interval that tells models apart.
DEFAULT_FRACTIONS = (0.8, 0.1, 0.1)


class SplitRule(BaseModel):
    """How one table of interactions is cut by time; by fractions 0.8, 0.1, 0.1 when nothing is given.

    Attributes:
        fractions: of the rows in time order, for train, valid and, if there are three, test; they sum to 1. A
            cut never separates equal timestamps: it moves to the nearest change of timestamp.
        dates: the first moment of valid and, if there are two, of test; without a zone in UTC.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fractions: tuple[float, float] | tuple[float, float, float] | None = None
    dates: tuple[datetime] | tuple[datetime, datetime] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fractions and self.dates:
            raise ValueError("give fractions or dates, not both")
        if self.fractions and (min(self.fractions) <= 0 or abs(sum(self.fractions) - 1) > 1e-6):
            raise ValueError(f"fractions {self.fractions} must each be above 0 and sum to 1")
        cuts = self._date_cuts()
        if any(late <= early for early, late in pairwise(cuts)):
            raise ValueError("test must begin after valid")
        return self

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the rule that a command line gives: "0.8,0.1,0.1" or "2017-11-01,2017-12-01".

        Raises:
            DataError: the text is neither.
        """
        parts = tuple(part.strip() for part in text.split(","))
        given: dict[str, Any]
        try:
            given = {"fractions": tuple(float(part) for part in parts)}
        except ValueError:
            given = {"dates": parts}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            mend = "give fractions as in 0.8,0.1,0.1 or dates as in 2017-11-01,2017-12-01"
            raise DataError(f"split '{text}': {first_problem(error)}; {mend}") from None

    def cuts(self, timestamps: pl.Series) -> list[float]:
        """Return the first timestamp of valid and, when there is one, of test; seconds UTC, rising."""
        if self.dates:
            return self._date_cuts()
        fractions = self.fractions or DEFAULT_FRACTIONS
        in_order = np.sort(timestamps.to_numpy())
        # A cut at place p separates rows p-1 and p: allowed only where the timestamp changes.
        places = np.flatnonzero(in_order[1:] != in_order[:-1]) + 1
        if len(places) == 0:
            return [np.inf] * (len(fractions) - 1)
        wanted = np.cumsum(fractions)[:-1] * len(in_order)
        nearest = np.abs(places[None, :] - wanted[:, None]).argmin(axis=1)
        return [float(in_order[place]) for place in places[nearest]]

    def _date_cuts(self) -> list[float]:
        moments = [moment if moment.tzinfo else moment.replace(tzinfo=UTC) for moment in self.dates or ()]
        return [moment.timestamp() for moment in moments]


def split_by_time(interactions: pl.DataFrame, rule: SplitRule, file: str) -> dict[str, pl.DataFrame]:
    """Return the splits of one table by its column `timestamp`; rows keep their file order within a split.

    Raises:
        DataError: a split would be empty; names `file`.
    """
    cuts = rule.cuts(interactions["timestamp"])
    split_of_row = pl.Series(np.searchsorted(cuts, interactions["timestamp"].to_numpy(), side="right"))
    splits = {}
    for place, name in enumerate(SPLITS[: len(cuts) + 1]):
        splits[name] = interactions.filter(split_of_row == place)
        if splits[name].height == 0:
            raise DataError(
                f"{file}: split '{name}' is empty when cut by time; choose other fractions or dates within "
                f"{_moment(interactions['timestamp'].min())} to {_moment(interactions['timestamp'].max())}"
            )
    return splits


def _moment(seconds: object) -> str:
    assert isinstance(seconds, (int, float))
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
