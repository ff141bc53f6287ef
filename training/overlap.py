"""What a bundle and a data folder have in common: rows, titles and times, so that no figure is taken for another.

Shapes: N rows of a split.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from models.bundle import Manifest
from models.features import Tables
from training.counts import counts_by_id
from training.data.dataset import Dataset, fingerprint_of
from training.data.errors import DataError

ROWS_FILE = "rows.safetensors"
# The smallest hashes of a split stand for all of its rows: 400 kB tell a share of one in a thousand.
KEPT = 50_000
USED_FOR = {"train": "that the bundle was trained on", "valid": "on which its checkpoints and fusion were chosen"}


def write_rows(path: Path, splits: Mapping[str, pl.DataFrame]) -> None:
    """Write the smallest hashes of the rows of train and valid, for `doubts`."""
    kept = {name: np.sort(_hashes(splits[name]))[:KEPT].astype(np.int64) for name in USED_FOR}
    save_file({name: torch.from_numpy(hashes_N) for name, hashes_N in kept.items()}, path)


def doubts(bundle: Path, manifest: Manifest, tables: Tables, dataset: Dataset, split: str) -> list[str]:
    """Return a sentence for each reason to doubt the figures of a bundle on a split.

    The reasons are rows that the bundle was trained on or chosen on, rows older than these, and other titles.
    """
    frame, said = dataset.splits[split], []
    known = load_file(bundle / ROWS_FILE) if (bundle / ROWS_FILE).is_file() else {}
    hashes_N = _hashes(frame)
    for name, kept in known.items():
        share = _share_among(hashes_N, kept.numpy())
        if share and name != split:
            said.append(
                f"{_rows(share, frame.height)} of {dataset.file_of(split)} are rows {USED_FOR[name]}: the figures say"
                " nothing of new rows; split the data as its fit did"
            )
    until = manifest.trained_until
    train = dataset.splits.get("train")
    same_train = train is not None and train["timestamp"].max() == until
    early = 0 if until is None or same_train or split == "train" else int((frame["timestamp"] < until).sum())
    if early and until is not None:
        said.append(
            f"{early:,} of {frame.height:,} rows of {dataset.file_of(split)} are older than the newest row that the"
            f" bundle was trained on ({_moment(until)}): the figures look back from the future"
        )
    titles = pl.DataFrame({"item_id": list(tables.item_ids), "own": list(tables.titles)})
    shared = dataset.items.join(titles, on="item_id")
    other = shared.filter(pl.col("title") != pl.col("own"))
    if other.height:
        item_id, title, own = other.row(0)
        said.append(
            f"{other.height:,} of {shared.height:,} items have another title than in the bundle, whose title is used:"
            f" {item_id!r} is {title!r} in the folder and {own!r} in the bundle"
        )
    return said


def tables_before_test(tables: Tables, dataset: Dataset, manifest: Manifest) -> Tables:
    """Return the bundle's tables without the rows of a folder's test split, if there is no train to count from.

    Counts and outcomes of a bundle hold all rows of the folder that it was trained on, also those of test.

    Raises:
        DataError: the bundle's counts may hold labels of test, and test is not as the bundle knows it.
    """
    if "train" in dataset.splits or "test" not in dataset.splits or "test" not in manifest.splits:
        return tables
    test = dataset.splits["test"]
    if manifest.splits["test"] != fingerprint_of({"test": test}):
        early = int((test["timestamp"] <= manifest.counted_until).sum())
        if early:
            raise DataError(
                f"{dataset.file_of('test')}: {early:,} of {test.height:,} rows are not newer than the bundle's counts"
                f" ({_moment(manifest.counted_until)}), which may hold their labels; add train to the folder, so that"
                " the bundle's counts are not used"
            )
        return tables
    shown = test.select("user_id", "item_id", pl.col("timestamp").cast(pl.Float64))
    of_test = set(shown.iter_rows())
    return replace(
        tables,
        user_counts_U2=tables.user_counts_U2 - _counts(test, "user_id", tables.user_ids),
        item_counts_I2=tables.item_counts_I2 - _counts(test, "item_id", tables.item_ids),
        outcomes=[
            tuple(one for one in told if (user_id, one.item_id, one.shown) not in of_test)
            for user_id, told in zip(tables.user_ids, tables.outcomes, strict=True)
        ],
    )


def _counts(frame: pl.DataFrame, column: str, ids: Sequence[str]) -> NDArray[np.int64]:
    known = pl.Series(column, ids, dtype=pl.String).to_frame()
    joined = known.join(counts_by_id(frame, column), on=column, how="left", maintain_order="left")
    return joined.select("impressions", "positives").fill_null(0).to_numpy()


def _hashes(frame: pl.DataFrame) -> NDArray[np.uint64]:
    """Return a hash of user, item and time of each row, `(N,)`, below 2^63; the same on every machine."""
    hashes_N = _mixed(frame["timestamp"].cast(pl.Float64).to_numpy().view(np.uint64))
    for column in ("user_id", "item_id"):
        distinct = frame[column].unique()
        digests = [int.from_bytes(hashlib.blake2b(one.encode(), digest_size=8).digest()) for one in distinct]
        codes = frame[column].replace_strict(distinct, pl.Series(digests, dtype=pl.UInt64)).to_numpy()
        hashes_N = _mixed(hashes_N ^ codes)
    return hashes_N >> np.uint64(1)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the finalizer of SplitMix64."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _share_among(hashes_N: NDArray[np.uint64], kept: NDArray[np.int64]) -> float:
    """Return the share of rows that are among those whose smallest hashes were kept."""
    if len(kept) >= KEPT:
        hashes_N = hashes_N[hashes_N <= np.uint64(kept[-1])]
    return float(np.isin(hashes_N, kept.astype(np.uint64)).mean()) if len(hashes_N) else 0.0


def _rows(share: float, rows: int) -> str:
    return f"{share * rows:,.0f} of {rows:,} rows" if share * rows >= 1 else f"some of {rows:,} rows"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(" ", "seconds")
