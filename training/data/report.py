"""What a preparation kept and what it dropped, for printing."""

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl


@dataclass(frozen=True)
class SplitSize:
    """One split in numbers."""

    rows: int
    users: int
    items: int
    positives: int


@dataclass(frozen=True)
class Report:
    """The outcome of one preparation.

    Attributes:
        splits: by name; a split without rows was not written.
        items: size of the catalogue that was written.
        notes: what else to know of the reading, one sentence each.
        dropped: reason → rows of the raw data left out for it, in the order in which the reasons apply.
    """

    splits: Mapping[str, SplitSize]
    items: int
    dropped: Mapping[str, int]
    notes: tuple[str, ...] = ()


def describe(
    tables: Mapping[str, pl.DataFrame], dropped: Mapping[str, int] | None = None, notes: tuple[str, ...] = ()
) -> Report:
    """Return the report on the tables of a folder: `items` and splits."""
    splits = {
        name: SplitSize(
            rows=table.height,
            users=table["user_id"].n_unique(),
            items=table["item_id"].n_unique(),
            positives=int(table["label"].sum()),
        )
        for name, table in tables.items()
        if name != "items"
    }
    return Report(splits, tables["items"].height, dict(dropped or {}), notes)
