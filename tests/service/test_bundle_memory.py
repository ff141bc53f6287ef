"""What is told of a bundle's memory before it is loaded."""

from typing import Any

import pytest

from models.bundle import FileEntry, Manifest
from models.loading import Bundle
from service.bundles import memory
from service.bundles.memory import GIB, check_memory, needed
from service.engines.protocol import EngineUsage
from service.errors import BundleTooLargeError
from service.settings import Settings

WEIGHTS = 7_615_616_512  # Qwen2-7B


@pytest.fixture
def large(bundle: Bundle) -> Manifest:
    backbone = bundle.manifest.backbone.model_copy(update={"parameters": WEIGHTS, "dtype": "bfloat16"})
    files = {"semantic.safetensors": FileEntry(sha256="0" * 64, size=10 * GIB)}
    return bundle.manifest.model_copy(update={"backbone": backbone, "files": files})


def settings(bundle: Bundle, **given: Any) -> Settings:
    return Settings(bundle=bundle.folder, cache_mb=1024, **given)


def test_merging_takes_four_bytes_a_weight_and_shared_weights_take_none(bundle: Bundle, large: Manifest) -> None:
    alone = needed(large, settings(bundle), device="cpu", shared=False)
    assert 4 * WEIGHTS + 10 * GIB < alone.host < 4 * WEIGHTS + 11 * GIB and not alone.device
    assert needed(large, settings(bundle), device="cpu", shared=True).host < 10.5 * GIB
    on_gpu = needed(large, settings(bundle), device="cuda:0", shared=False)
    assert on_gpu.device == 4 * WEIGHTS and on_gpu.host > 4 * WEIGHTS


def test_a_bundle_is_refused_with_what_it_needs_and_what_is_free(
    bundle: Bundle, large: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "host_memory", lambda: (40 * GIB, 64 * GIB))
    # What the cache of the one that serves has not taken yet is its own.
    serving = EngineUsage(cache_bytes=0, device="cpu", memory_bytes=GIB, memory_total_bytes=64 * GIB)
    check_memory(large, settings(bundle), [EngineUsage(cache_bytes=GIB, device="cpu")], shared=False)
    monkeypatch.setattr(memory, "host_memory", lambda: (39.2 * GIB, 64 * GIB))
    with pytest.raises(BundleTooLargeError, match=r"takes up to 39\.00 GiB.*38\.20 GiB are free"):
        check_memory(large, settings(bundle), [serving], shared=False)


def test_a_gpus_memory_is_what_its_worker_tells(
    bundle: Bundle, large: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "host_memory", lambda: (200 * GIB, 200 * GIB))
    full = EngineUsage(device="cuda:0", cache_bytes=GIB, memory_bytes=60 * GIB, memory_total_bytes=80 * GIB)
    with pytest.raises(BundleTooLargeError, match=r"GiB on cuda:0.*20\.00 GiB are free"):
        check_memory(large, settings(bundle), [full], shared=False)
    check_memory(large, settings(bundle), [full], shared=True)
