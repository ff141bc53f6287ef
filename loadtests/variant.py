"""A bundle like another one, with an id of its own: to measure a switch without a second training."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from models.bundle import MANIFEST, FileEntry, Manifest, merged_id, read_manifest, write_bundle

ADAPTER = Path("adapter") / "adapter_model.safetensors"
SHIFT = 1e-3  # of the logit of every score
SHRUNK = 0.999  # of the adapter's weights: other merged weights, hardly other scores


def write_variant(bundle: Path, out: Path, *, other_weights: bool) -> None:
    """Write a copy of a bundle with another intercept of its score; `other_weights` changes the merged weights too.

    Raises:
        BundleError: there is no bundle, or something is at `out` already.
    """
    manifest = read_manifest(bundle)

    def fill(folder: Path) -> None:
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
        (folder / MANIFEST).unlink()
        fusion = json.loads((folder / "fusion.json").read_text())
        for counting in ("static", "live"):
            fusion[counting]["intercept"] += SHIFT
        (folder / "fusion.json").write_text(json.dumps(fusion))
        if other_weights:
            tensors = load_file(folder / ADAPTER)
            save_file({name: one * SHRUNK for name, one in tensors.items()}, folder / ADAPTER)

    backbone = manifest.backbone

    def manifest_of(files: dict[str, FileEntry]) -> Manifest:
        merged = merged_id(backbone.base_id, out.with_name(f".{out.name}.part") / "adapter", backbone.dtype)
        return manifest.model_copy(
            update={"files": files, "backbone": backbone.model_copy(update={"merged_id": merged})}
        )

    write_bundle(out, manifest_of, fill)
