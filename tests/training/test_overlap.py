"""A bundle and a data folder: what `evaluate` says of rows that were trained on, of times and of titles."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from models.loading import Bundle
from tests.training.commands import refused, sella_train
from tests.training.micro import Trained
from training import overlap
from training.counts import LIVE, row_counts, row_outcomes
from training.data.dataset import Dataset, load_dataset
from training.overlap import _hashes, _share_among, tables_before_test

Folder = Callable[..., Path]


@pytest.fixture
def changed(trained: Trained, tmp_path: Path) -> Folder:
    """Write the data again, with other tables in place of some; None leaves one out."""

    def write(**tables: pl.DataFrame | None) -> Path:
        folder = Path(shutil.copytree(trained.data, tmp_path / "changed"))
        for name, table in tables.items():
            (folder / f"{name}.parquet").unlink()
            if table is not None:
                table.write_parquet(folder / f"{name}.parquet")
        return folder

    return write


def table(trained: Trained, name: str) -> pl.DataFrame:
    return pl.read_parquet(trained.data / f"{name}.parquet")


def said(trained: Trained, folder: Path, *more: object) -> list[str]:
    result = sella_train("evaluate", "--bundle", trained.bundle, "--data", folder, "--json", *more)
    assert result.exit_code == 0, result.output
    return [line for line in result.stderr.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_the_data_of_the_fit_raises_no_doubt(trained: Trained, split: str) -> None:
    assert said(trained, trained.data, "--split", split) == []


def test_rows_that_were_trained_on_are_told(trained: Trained, changed: Folder) -> None:
    train, test = table(trained, "train"), table(trained, "test")
    folder = changed(test=pl.concat([train.tail(60), test]))
    lines = said(trained, folder)
    assert any("60 of 260 rows of test.parquet are rows that the bundle was trained on" in line for line in lines)


def test_another_cut_of_the_same_interactions_is_told(trained: Trained, tmp_path: Path) -> None:
    """The whole in one file, cut otherwise than in the fit: test holds rows of train and of valid."""
    shutil.copy(trained.data / "items.parquet", tmp_path)
    whole = pl.concat(table(trained, name) for name in ("train", "valid", "test"))
    whole.write_parquet(tmp_path / "interactions.parquet")
    lines = said(trained, tmp_path, "--split-by", "0.3,0.1,0.6")
    assert "are rows that the bundle was trained on" in lines[0]
    assert "are rows on which its checkpoints and fusion were chosen" in lines[1]


def test_rows_older_than_train_are_told(trained: Trained, changed: Folder) -> None:
    test = table(trained, "test").with_columns(pl.col("timestamp") - 10 * 365 * 86_400)
    lines = said(trained, changed(test=test, train=table(trained, "valid"), valid=None))
    told = "200 of 200 rows of test.parquet are older than the newest row that the bundle was trained on"
    assert any(told in line for line in lines)


def test_valid_before_train_is_told_from_the_folder_alone(trained: Trained, changed: Folder) -> None:
    valid = table(trained, "valid").with_columns(pl.col("timestamp") - 10 * 365 * 86_400)
    lines = said(trained, changed(valid=valid), "--split", "valid")
    assert lines == [
        "warning: valid.parquet: 200 of 200 rows of valid are older than the newest row of train; figures on them look"
        " back from the future"
    ]


def test_other_titles_are_told(trained: Trained, changed: Folder) -> None:
    items = table(trained, "items")
    folder = changed(items=items.with_columns(title=pl.when(pl.int_range(80) < 2).then(pl.lit("X")).otherwise("title")))
    [line] = said(trained, folder)
    assert line.startswith("warning: 2 of 80 items have another title than in the bundle, whose title is used: ")


def test_a_test_split_alone_is_judged_as_beside_its_train(trained: Trained, changed: Folder) -> None:
    """The bundle's counts hold the labels of test: without train they are taken out."""
    bundle = Bundle.open(trained.bundle)
    whole = load_dataset(trained.data)
    alone = Dataset(whole.items, {"test": whole.splits["test"]}, files={"test": "test.parquet"})
    tables = tables_before_test(bundle.tables(), alone, bundle.manifest)
    expected, found = row_counts(whole, "test", LIVE), row_counts(alone, "test", LIVE, tables)
    for name, values_B in vars(expected).items():
        np.testing.assert_array_equal(vars(found)[name], values_B)
    known, told = row_outcomes(whole, "test", LIVE, tables), row_outcomes(alone, "test", LIVE, tables)
    assert [told.of(row) for row in range(200)] == [known.of(row) for row in range(200)]
    leaked = row_counts(alone, "test", LIVE, bundle.tables())
    assert (leaked.item_impressions_B > found.item_impressions_B).all()

    folder = changed(train=None, valid=None)
    assert said(trained, folder, "--live") == []
    other = table(trained, "test").head(150)
    other.write_parquet(folder / "test.parquet")
    line = refused("evaluate", "--bundle", trained.bundle, "--data", folder)
    assert "150 of 150 rows are not newer than the bundle's counts" in line and "add train" in line


@pytest.mark.parametrize("more", [(), ("--live",), ("--live", "--delay", 3600)])
def test_test_is_judged_as_if_the_bundle_had_never_held_its_rows(
    trained: Trained, bundle: Bundle, more: tuple[object, ...]
) -> None:
    """`bundle` is of the same training, and its histories and counts end with valid."""
    assert Bundle.open(trained.bundle).manifest.counted_until > bundle.manifest.counted_until
    reports = []
    for folder in (trained.bundle, bundle.folder):
        result = sella_train("evaluate", "--bundle", folder, "--data", trained.data, "--json", *more)
        assert result.exit_code == 0, result.output
        reports.append(result.stdout)
    assert reports[0] == reports[1]


def test_what_was_trained_is_the_same_with_and_without_test(trained: Trained, bundle: Bundle) -> None:
    latest = Bundle.open(trained.bundle).manifest
    assert latest.metrics == bundle.manifest.metrics and latest.reference == bundle.manifest.reference
    same = {name for name, entry in latest.files.items() if bundle.manifest.files[name] == entry}
    assert latest.files.keys() - same == {"users.parquet", "items.parquet", "collab.safetensors"}
    users = pl.read_parquet(trained.bundle / "users.parquet")
    rows = pl.concat(table(trained, name).select("user_id", "label") for name in ("train", "valid", "test"))
    counted = rows.group_by("user_id").agg(impressions=pl.len(), positives=pl.col("label").sum())
    joined = users.select("user_id").join(counted, on="user_id", how="left", maintain_order="left")
    assert users["impressions"].to_list() == joined["impressions"].to_list()
    assert users["history_total"].to_list() == joined["positives"].to_list() == users["positives"].to_list()


def test_the_reference_of_history_lengths_is_that_of_requests(trained: Trained) -> None:
    """One request for each user and moment of valid, not one for each user: few users ask often."""
    rows = pl.concat(table(trained, name) for name in ("train", "valid")).rows(named=True)
    asked = {(row["user_id"], row["timestamp"]) for row in table(trained, "valid").rows(named=True)}
    lengths = [
        sum(row["label"] for row in rows if row["user_id"] == user and row["timestamp"] < moment)
        for user, moment in asked
    ]
    reference = Bundle.open(trained.bundle).manifest.reference["history_length_deciles"]
    assert reference == np.quantile(lengths, np.linspace(0, 1, 11)).tolist()


@pytest.mark.parametrize("kept", [100, 50_000])
def test_the_smallest_hashes_tell_the_share_of_shared_rows(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(overlap, "KEPT", kept)
    rows = pl.DataFrame(
        {
            "user_id": [f"u{row % 97}" for row in range(20_000)],
            "item_id": [f"i{row % 89}" for row in range(20_000)],
            "timestamp": range(20_000),
        }
    )
    mine = np.sort(_hashes(rows[:10_000]))[:kept].astype(np.int64)
    half = _share_among(_hashes(rows[5_000:15_000]), mine)
    assert half == 0.5 if kept > 10_000 else 0.3 < half < 0.7
    assert _share_among(_hashes(rows[10_000:]), mine) == 0
    assert len(np.unique(_hashes(rows))) == 20_000
    assert _hashes(rows)[:2].tolist() == [
        1429179623384861530,
        6786704130372747609,
    ]  # the same on every machine, in every version
