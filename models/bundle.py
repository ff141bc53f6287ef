"""The bundle: everything serving needs, in one folder, with one id.

Only safetensors, parquet and JSON: nothing that can execute. Loading verifies every byte and names the file that
fails; writing goes to a temporary folder, then one rename.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.template import TemplateConfig

FORMAT_VERSION = 7
MANIFEST = "manifest.json"
ADAPTER = "adapter"
WIDEST = 2**20  # of a vector
READ_BYTES = 16 * 2**20  # read and hashed at once


class BundleError(ValueError):
    """A bundle that cannot be used; the message names the file and what is wrong with it."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Frozen):
    """One file's identity."""

    sha256: str
    size: int


class BackboneEntry(_Frozen):
    """Which language model, and how its weights are used."""

    source: str = Field(
        description='where its weights are: "backbone" (in the bundle), a hub id, an absolute path, or "cache:" and the'
        " name of a folder in sella's cache of converted backbones"
    )
    revision: str | None = Field(None, description="commit of the hub's repository; none for other sources")
    base_id: str = Field(description="hash of the base weights in fp32, the tokenizer and config.json")
    merged_id: str = Field(description="identity of base, adapter and dtype: bundles that share it share one loaded LM")
    dtype: Literal["float32", "bfloat16"]
    parameters: int = Field(gt=0, description="weights, from which the memory that loading takes is told beforehand")
    yes_id: int
    no_id: int


class Dimensions(_Frozen):
    """Sizes of the tables and projections."""

    d_collab: int = Field(ge=3, le=WIDEST)  # two of them hold the biases
    d_hidden: int = Field(ge=1, le=WIDEST)
    d_model: int = Field(ge=1, le=WIDEST)
    users: int = Field(ge=0)
    items: int = Field(ge=0)


class Manifest(_Frozen):
    """The bundle's description of itself."""

    format_version: int = FORMAT_VERSION
    bundle_id: str = Field("", description="hash of every other field, and so of every file")
    created_by: str
    backbone: BackboneEntry
    template: TemplateConfig
    dimensions: Dimensions
    data_fingerprint: str
    counted_until: float = Field(
        allow_inf_nan=False, description="latest timestamp, UTC seconds, of the rows behind counts and histories"
    )
    trained_until: float | None = Field(
        None, allow_inf_nan=False, description="latest timestamp, UTC seconds, of the rows that were trained on"
    )
    splits: dict[str, str] = Field({}, description="fingerprint of the rows of each split behind counts and histories")
    training: dict[str, Any]
    seed: int
    metrics: dict[str, Any]
    reference: dict[str, Any] = Field(description="distributions on the validation split, for drift")
    files: dict[str, FileEntry]

    def canonical(self) -> bytes:
        """Return the only bytes that a manifest file may hold."""
        return (json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False) + "\n").encode()

    def sealed(self) -> "Manifest":
        """Return the manifest with its bundle id filled in."""
        unsealed = self.model_copy(update={"bundle_id": ""})
        return self.model_copy(update={"bundle_id": hashlib.sha256(unsealed.canonical()).hexdigest()})


def merged_id(base_id: str, adapter: Path, dtype: str) -> str:
    """Return the identity of merged weights: hashed from what they are made of, so that it holds on any machine."""
    return _merged(base_id, dtype, _describe(adapter))


def _merged(base_id: str, dtype: str, adapter: Mapping[str, FileEntry]) -> str:
    parts = [base_id, dtype, *(f"{name}:{entry.sha256}" for name, entry in sorted(adapter.items()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def write_bundle(out: Path, manifest: Callable[[dict[str, FileEntry]], Manifest], fill: Callable[[Path], None]) -> None:
    """Write a bundle at `out`: `fill` writes its files into a temporary folder beside it, then one rename.

    Raises:
        BundleError: something is already there.
    """
    if out.exists():
        raise BundleError(f"{out} already exists; choose another path or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.part")
    shutil.rmtree(folder, ignore_errors=True)  # left by a writer that was killed
    try:
        folder.mkdir()
        fill(folder)
        sealed = manifest(_describe(folder)).sealed()
        (folder / MANIFEST).write_bytes(sealed.canonical())
        _open_to_readers(folder)
        for path in folder.rglob("*"):
            _sync(path)
        _sync(folder)
        folder.rename(out)
        _sync(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _open_to_readers(folder: Path) -> None:
    """Give every file and folder the mode that the umask gives new ones: some libraries write for the owner alone."""
    modes = {True: folder.stat().st_mode, False: (folder / MANIFEST).stat().st_mode}
    for path in folder.rglob("*"):
        path.chmod(modes[path.is_dir()] & 0o777)


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest and check it against its own id; the files are not read.

    Raises:
        BundleError: not a bundle, another format, or an altered manifest.
    """
    path = folder / MANIFEST
    if path.exists() and not path.is_file():  # a pipe would make the reader wait for a writer
        raise BundleError(f"{path}: is no regular file; is {folder} a bundle?")
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for its writer
            raise OSError("not a regular file")
        raw = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror or error}; is {folder} a bundle?") from error
    try:
        fields = json.loads(raw)
        version = fields.get("format_version") if isinstance(fields, dict) else None
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise BundleError(f"{path}: format {version}; this sella reads format {FORMAT_VERSION}: train it again")
        manifest = Manifest.model_validate(fields)
    except (ValidationError, ValueError, RecursionError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{path}: not a manifest: {str(error).splitlines()[0]}") from error
    if raw != manifest.canonical() or manifest.sealed() != manifest:
        raise BundleError(f"{path}: altered since it was written (its id does not match its contents)")
    return manifest


def verify(folder: Path, only: str | None = None, hashes: Mapping[str, str] | None = None) -> Manifest:
    """Check every file of a bundle against its manifest, or one alone, and return the manifest.

    `hashes` are those of its files where they are known already, by relative path.

    Raises:
        BundleError: names the first file that is missing, altered or not the bundle's.
    """
    manifest = read_manifest(folder)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()} - {MANIFEST}
    for name in sorted(found - manifest.files.keys()):
        raise BundleError(f"{folder / name}: not part of the bundle; remove it")
    for name, entry in sorted(manifest.files.items()):
        if only not in (None, name):
            continue
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{path}: missing")
        if path.stat().st_size != entry.size:
            raise BundleError(f"{path}: {path.stat().st_size} bytes, expected {entry.size}")
        if (_hash(path) if hashes is None else hashes.get(name)) != entry.sha256:
            raise BundleError(f"{path}: altered since it was written (sha256 differs)")
    _check_merged_id(folder, manifest)
    return manifest


def read_verified(folder: Path, manifest: Manifest, name: str) -> NDArray[np.uint8]:
    """Return a file's bytes in this process's own memory, checked as they were read.

    Nothing that becomes of the file later changes what was read. A mapped file would: an overwritten one changes
    scores, and a shortened one ends the process with SIGBUS.

    Raises:
        BundleError: names the file, which is missing or altered.
    """
    path, entry = folder / name, manifest.files.get(name)
    if entry is None or not path.is_file():
        raise BundleError(f"{path}: missing")
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.size:
                raise BundleError(f"{path}: {size} bytes, expected {entry.size}")
            content = np.empty(size, np.uint8)
            done = 0
            while count := file.readinto(content.data[done : done + READ_BYTES]):
                digest.update(content.data[done : done + count])
                done += count
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from error
    if done != size or digest.hexdigest() != entry.sha256:
        raise BundleError(f"{path}: altered since it was written (sha256 differs)")
    return content


def _check_merged_id(folder: Path, manifest: Manifest) -> None:
    """Bundles of equal merged weights share one language model, so the identity must be the adapter's own."""
    entry, prefix = manifest.backbone, f"{ADAPTER}/"
    adapter = {name.removeprefix(prefix): one for name, one in manifest.files.items() if name.startswith(prefix)}
    if _merged(entry.base_id, entry.dtype, adapter) != entry.merged_id:
        raise BundleError(f"{folder / ADAPTER}: not the adapter that the manifest's merged_id is of")


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder of a bundle's part, such as an adapter or a backbone."""
    shutil.copytree(source, target)


def _describe(folder: Path) -> dict[str, FileEntry]:
    return {
        path.relative_to(folder).as_posix(): FileEntry(sha256=_hash(path), size=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
