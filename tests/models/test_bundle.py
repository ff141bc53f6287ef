import json
import os
import random
import shutil
from pathlib import Path

import polars as pl
import pytest

from models.bundle import MANIFEST, BundleError, read_manifest, verify, write_bundle
from models.loading import Bundle
from tests.tiny import tiny_bundle


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(bytes(data))


def test_a_whole_bundle_verifies_and_names_itself(bundle: Bundle) -> None:
    assert verify(bundle.folder) == bundle.manifest
    assert len(bundle.id) == 64


def test_equal_contents_give_equal_ids_and_others_do_not(bundle: Bundle, tmp_path: Path) -> None:
    assert tiny_bundle(tmp_path / "same").id == bundle.id
    assert tiny_bundle(tmp_path / "other", seed=1).id != bundle.id


def test_one_altered_byte_in_any_file_is_found_and_named(copied: Path) -> None:
    rng = random.Random(0)
    for path in sorted(path for path in copied.rglob("*") if path.is_file() and path.name != MANIFEST):
        size = path.stat().st_size
        for position in {0, size - 1, rng.randrange(size)}:
            flip(path, position)
            with pytest.raises(BundleError, match=path.name):
                verify(copied)
            flip(path, position)
    verify(copied)


def test_no_byte_of_the_manifest_can_be_altered(copied: Path) -> None:
    path = copied / MANIFEST
    size = path.stat().st_size
    rng = random.Random(1)
    for position in {0, size - 1, *(rng.randrange(size) for _ in range(300))}:
        bit = rng.randrange(8)
        flip(path, position, bit)
        with pytest.raises(BundleError, match=MANIFEST):
            read_manifest(copied)
        flip(path, position, bit)
    read_manifest(copied)


@pytest.mark.parametrize(
    ("name", "fields"), [("config.json", {"rms_norm_eps": 0.5}), ("tokenizer_config.json", {"add_bos_token": True})]
)
def test_a_backbone_described_otherwise_is_not_the_bundles_own(
    bundle: Bundle, tmp_path: Path, name: str, fields: dict[str, object]
) -> None:
    """The manifest is written again, so that every file verifies: only the identity shows the change."""

    def fill(folder: Path) -> None:
        shutil.copytree(bundle.folder, folder, dirs_exist_ok=True)
        (folder / MANIFEST).unlink()
        path = folder / "backbone" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    write_bundle(tmp_path / "other", lambda files: bundle.manifest.model_copy(update={"files": files}), fill)
    with pytest.raises(BundleError, match="not those the bundle was trained on"):
        Bundle.open(tmp_path / "other").backbone()


@pytest.mark.parametrize(
    ("items", "labels", "times", "told"),
    [
        (["i1", "i2"], [True], [1.0, 2.0], "user 'u1' has 2 outcomes, 1 labels and 2 times"),
        (["i1", "i2"], [True, False], [], "user 'u1' has 2 outcomes, 2 labels and 0 times"),
        (["i1", "gone"], [True, False], [1.0, 2.0], "outcome of item 'gone', which is not in items.parquet"),
        (None, None, None, "column 'outcome_items' is missing; train the bundle again"),
    ],
)
def test_stored_outcomes_that_do_not_fit_the_tables_are_named(
    bundle: Bundle,
    tmp_path: Path,
    items: list[str] | None,
    labels: list[bool] | None,
    times: list[float] | None,
    told: str,
) -> None:
    def fill(folder: Path) -> None:
        shutil.copytree(bundle.folder, folder, dirs_exist_ok=True)
        (folder / MANIFEST).unlink()
        users = pl.read_parquet(folder / "users.parquet")
        columns = {"outcome_items": items, "outcome_labels": labels, "outcome_times": times}
        changed = [
            pl.Series(name, [value if row == 1 else [] for row in range(users.height)], users.schema[name])
            for name, value in columns.items()
        ]
        changed_users = users.drop(columns) if items is None else users.with_columns(changed)
        changed_users.write_parquet(folder / "users.parquet")

    write_bundle(tmp_path / "other", lambda files: bundle.manifest.model_copy(update={"files": files}), fill)
    with pytest.raises(BundleError, match=told):
        Bundle.open(tmp_path / "other").tables()


def test_a_missing_a_shortened_and_a_foreign_file_are_named(copied: Path) -> None:
    adapter = copied / "adapter" / "adapter_model.safetensors"
    content = adapter.read_bytes()
    adapter.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=r"adapter_model\.safetensors: \d+ bytes, expected"):
        verify(copied)
    adapter.unlink()
    with pytest.raises(BundleError, match=r"adapter_model\.safetensors: missing"):
        verify(copied)
    adapter.write_bytes(content)
    (copied / "adapter" / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(BundleError, match=r"adapter_model\.bin: not part of the bundle"):
        verify(copied)


def test_what_is_no_bundle_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is .* a bundle"):
        verify(tmp_path)
    for text in ("", "[]", "null", "{", '{"format_version": 99}', "[" * 100_000):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(BundleError, match=MANIFEST):
            verify(tmp_path)


def test_writing_never_replaces_and_a_failed_write_leaves_nothing(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="already exists"):
        write_bundle(bundle.folder, lambda files: bundle.manifest, lambda folder: None)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_bundle(tmp_path / "out", lambda files: bundle.manifest, fail)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_cleared(bundle: Bundle, tmp_path: Path) -> None:
    left = tmp_path / ".out.part"
    left.mkdir()
    (left / "half").write_text("half")
    write_bundle(tmp_path / "out", lambda files: bundle.manifest, lambda folder: None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not (tmp_path / "out" / "half").exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_every_file_of_a_bundle_has_the_mode_that_the_umask_leaves(
    bundle: Bundle, tmp_path: Path, umask: int, mode: int
) -> None:
    """Some libraries write for the owner alone, and a server may be another user."""

    def fill(folder: Path) -> None:
        (folder / "part").mkdir(mode=0o700)
        (folder / "part" / "weights").touch(mode=0o600)

    before = os.umask(umask)
    try:
        write_bundle(tmp_path / "out", lambda files: bundle.manifest.model_copy(update={"files": files}), fill)
    finally:
        os.umask(before)
    modes = {path.is_dir(): path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*")}
    assert modes == {False: mode, True: 0o777 & ~umask}
