"""Where a language model's weights are: in a folder, in sella's cache of converted backbones, or on the hub."""

import json
import os
import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from models.backbone import BackboneError, first_line

CACHED = "cache:"  # prefix of the source of a converted backbone; the name of its folder in the cache follows
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_FILES = ["config.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "*.safetensors*"]
HUB_TIMEOUT_S = 5.0


def cache_folder() -> Path:
    """Return the folder of converted backbones: in SELLA_CACHE if it is set, otherwise in the user's cache.

    This function reads the environment, as `service.settings` does: training shares the folder and has no settings.
    """
    own = os.environ.get("SELLA_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME")
    root = Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "sella"
    return root.expanduser() / "backbones"


def weights_folder(source: str, revision: str | None) -> Path:
    """Return the folder that holds the weights of a bundle's backbone.

    Raises:
        BackboneError: the weights are not there; the message has the remedy.
    """
    if source.startswith(CACHED):
        name = source.removeprefix(CACHED)
        folder = cache_folder() / name
        if not folder.is_dir():
            raise BackboneError(
                f"backbone {name}: not in {folder.parent}; run `sella-train backbone {name.rsplit('-', 1)[0]}` (or give"
                " it the GGUF file), or set SELLA_CACHE"
            )
        return folder
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_absolute() or not HUB_ID.fullmatch(source):
        raise BackboneError(f"backbone {source}: no such folder; put the bundle's backbone there")
    try:
        return hub_snapshot(source, revision, offline=True)
    except BackboneError:
        return hub_snapshot(source, revision)


def hub_snapshot(hub_id: str, revision: str | None = None, *, offline: bool = False) -> Path:
    """Return the local copy of a hub repository, downloaded unless `offline`; its folder is named by the commit.

    Raises:
        BackboneError: the hub cannot be reached and there is no copy, or the repository has no safetensors.
    """
    refused: Exception | None = None
    if not offline:
        try:  # ask once: without a local copy of the commit, snapshot_download retries for half a minute
            HfApi().model_info(hub_id, revision=revision, timeout=HUB_TIMEOUT_S)
        except Exception as error:  # the type depends on the HTTP library of this version of huggingface_hub
            refused, offline = error, True
    try:
        found = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=HUB_FILES,
            etag_timeout=HUB_TIMEOUT_S,
            local_files_only=offline,
        )
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"backbone {hub_id}: no such file or folder, and the hub did not give it ({first_line(refused or error)});"
            " check the name and the network, or give a folder or a GGUF file"
        ) from error
    folder = Path(str(found))
    if not list(folder.glob("*.safetensors")):
        raise BackboneError(f"backbone {hub_id}: its copy {folder} has no *.safetensors; choose another repository")
    for index in folder.glob("*.safetensors.index.json"):
        parts = set(json.loads(index.read_text())["weight_map"].values())
        if missing := sorted(part for part in parts if not (folder / part).exists()):
            raise BackboneError(
                f"backbone {hub_id}: its copy {folder} lacks {', '.join(missing)}; start with the network up"
            )
    return folder
