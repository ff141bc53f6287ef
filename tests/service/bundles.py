"""Small bundles beside the session's own, in one bundle folder, and what to do with them."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

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
