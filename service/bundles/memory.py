"""What a bundle takes of memory, told from its manifest before any of it is loaded."""

from collections.abc import Iterable
from dataclasses import dataclass

import structlog

from models.bundle import Manifest
from models.projected import PROJECTED_BYTES
from service.engines.device_memory import host_memory
from service.engines.protocol import EngineUsage
from service.errors import BundleTooLargeError
from service.settings import Settings

GIB = 2**30
MERGING_BYTES = 4  # a weight while it is loaded: the adapter is merged in fp32, on the host and then on the device
BYTES = {"float32": 4, "bfloat16": 2, "fp8": 2}  # a weight afterwards; fp8 keeps bf16 beside where products need it
WORKER_BYTES = 640 * 2**20  # an interpreter with torch, and a forward's own tensors
TABLE_FACTOR = 8  # a parquet file's ids and titles as Python's strings, for each byte of it compressed


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a bundle takes: `host` of the machine's memory, `device` of a GPU's."""

    host: int
    device: int


def needed(manifest: Manifest, settings: Settings, *, device: str, shared: bool) -> Need:
    """Return what loading a bundle takes at its worst moment.

    `shared`: its language model is loaded already, and its tables and projections alone are new.
    """
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    tables = sum(TABLE_FACTOR * size for name, size in sizes.items() if name.endswith(".parquet"))
    tables += sizes.get("collab.safetensors", 0) + sizes.get("semantic.safetensors", 0)
    projected = 2 * PROJECTED_BYTES + sizes.get("projection.safetensors", 0)
    if shared:
        return Need(tables, projected) if device.startswith("cuda") else Need(tables + projected, 0)
    weights = manifest.backbone.parameters
    merging = MERGING_BYTES * weights
    steady = BYTES[settings.dtype or manifest.backbone.dtype] * weights + settings.cache_mb * 2**20 + projected
    if device.startswith("cuda"):
        return Need(tables + WORKER_BYTES + merging, max(merging, steady))
    return Need(tables + WORKER_BYTES + max(merging, steady), 0)


def check_memory(manifest: Manifest, settings: Settings, engines: Iterable[EngineUsage], *, shared: bool) -> None:
    """Refuse a bundle that does not fit beside what is loaded.

    Raises:
        BundleTooLargeError: with what it needs and what is free.
    """
    usages = list(engines)
    device = next((one.device for one in usages if one.device), "cpu")
    need = needed(manifest, settings, device=device, shared=shared)
    # What the caches of those that serve have not taken yet is theirs.
    owed = [max(0, settings.cache_mb * 2**20 - one.cache_bytes) for one in usages]
    host = host_memory()[0] - (0 if device.startswith("cuda") else sum(owed))
    _refuse_if_short(manifest, "of memory", need.host, host)
    if need.device:
        of_device = next(one for one in usages if one.device == device)
        free = of_device.memory_total_bytes - of_device.memory_bytes - sum(owed)
        _refuse_if_short(manifest, f"on {device}", need.device, free)


def warn_if_short(manifest: Manifest, settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Say at the first start that the memory may not do. It goes on: nothing is served yet that it could harm."""
    device = "cuda" if settings.device.startswith("cuda") else "cpu"
    need, free = needed(manifest, settings, device=device, shared=False), host_memory()[0]
    if need.host > free:
        log.warning("memory_short", needed_gib=round(need.host / GIB, 2), free_gib=round(free / GIB, 2))


def _refuse_if_short(manifest: Manifest, where: str, needed_bytes: int, free_bytes: int) -> None:
    if needed_bytes > free_bytes:
        raise BundleTooLargeError(
            f"bundle {manifest.bundle_id[:12]} takes up to {needed_bytes / GIB:.2f} GiB {where} while it is loaded"
            f" ({manifest.backbone.parameters:,} weights, tables, cache), and {max(0, free_bytes) / GIB:.2f} GiB are"
            " free; free some, lower SELLA_CACHE_MB, or restart the service with it",
            "bundle",
        )
