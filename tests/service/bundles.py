"""Small bundles beside the session's own, in one bundle folder, and what to do with them."""

import asyncio
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from models.bundle import MANIFEST, write_bundle
from models.loading import Bundle
from tests.tiny import tiny_bundle

RANK = {"user_id": "u3", "candidates": [f"i{i}" for i in range(12)]}


@dataclass(frozen=True)
class Family:
    """`alike` shares `first`'s language model, `other` does not."""

    first: Bundle
    alike: Bundle
    other: Bundle

    @property
    def folder(self) -> Path:
        return self.first.folder.parent


def make_family(folder: Path) -> Family:
    return Family(
        tiny_bundle(folder / "first"),
        tiny_bundle(folder / "alike", rest_seed=7),
        tiny_bundle(folder / "other", seed=5),
    )


async def give(client: httpx.AsyncClient, bundle: Bundle | str, role: str = "current", **more: Any) -> httpx.Response:
    name = bundle if isinstance(bundle, str) else bundle.folder.name
    return await client.post("/admin/bundle", json={"bundle": name, "role": role, **more}, timeout=120)


async def roles(client: httpx.AsyncClient) -> dict[str, str]:
    state = (await client.get("/admin/bundle")).json()
    return {one["role"]: one["bundle_id"] for one in state["roles"]}


async def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.01)


def forge(bundle: Bundle, out: Path, change: Callable[[Path], None], **fields: Any) -> Bundle:
    """A copy with a changed folder and manifest fields, whose hashes are right all the same."""

    def fill(folder: Path) -> None:
        shutil.copytree(bundle.folder, folder, dirs_exist_ok=True)
        (folder / MANIFEST).unlink()
        change(folder)

    write_bundle(out, lambda files: bundle.manifest.model_copy(update={"files": files, **fields}), fill)
    return Bundle.open(out)


def nothing(folder: Path) -> None: ...


def tensors(name: str, **changes: Callable[[NDArray[Any]], NDArray[Any]] | None) -> Callable[[Path], None]:
    """Change tensors of a safetensors file; None leaves one out. A dot in a name is written as two underscores."""

    def change(folder: Path) -> None:
        held = load_file(folder / name)
        for tensor, new in changes.items():
            key = tensor.replace("__", ".")
            old = held.pop(key)
            if new is not None:
                held[key] = np.ascontiguousarray(new(old))
        save_file(held, folder / name)

    return change


def frame(name: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Path], None]:
    """Change a table."""
    return lambda folder: change(pl.read_parquet(folder / name)).write_parquet(folder / name)


def put(value: float, row: int = 1) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Put a value into one place of a tensor."""

    def change(held: NDArray[Any]) -> NDArray[Any]:
        held = held.copy()
        held.reshape(-1)[row] = value
        return held

    return change
