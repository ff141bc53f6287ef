"""The backbone that `--backbone` names: found, loaded and probed before a run begins."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from models.backbone import BackboneError, first_line, load_backbone, load_tokenizer
from models.definition import Definition
from models.loading import BACKBONE
from models.probe import probe
from models.sources import CACHED, HUB_ID, cache_folder, hub_snapshot
from models.template import Template
from models.tokens import TextEncoder
from training.config import TINY
from training.conversion import KNOWN, converted
from training.run import Run


@dataclass(frozen=True)
class Source:
    """Where a backbone is: `name` as in the bundle's manifest, and the folder on this machine."""

    name: str
    folder: Path
    revision: str | None = None


@dataclass(frozen=True)
class Base:
    """A backbone that was loaded, passed the probe, and was freed again."""

    source: Source
    id: str  # of weights, tokenizer and config.json
    definition: Definition
    encoder: TextEncoder = field(repr=False)


def find_backbone(given: str) -> Source:
    """Find the backbone of a known name, a GGUF file, a folder or a hub id; download and convert it if needed.

    Raises:
        BackboneError: it does not exist or cannot be downloaded; the message has the remedy.
    """
    path = Path(given).expanduser()
    if given in KNOWN or path.is_file():
        folder = converted(given if given in KNOWN else str(path))
        return Source(f"{CACHED}{folder.name}" if folder.parent == cache_folder() else str(folder), folder)
    if path.is_dir():
        if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
            raise BackboneError(f"backbone {given}: the folder lacks config.json or *.safetensors; give another one")
        return Source(str(path.resolve()), path)
    if path.is_absolute() or given.startswith((".", "~")) or given.endswith(".gguf") or not HUB_ID.fullmatch(given):
        names = ", ".join((TINY, *sorted(KNOWN)))
        raise BackboneError(
            f"backbone {given}: no such file or folder; give {names}, a hub id, a folder or a GGUF file"
        )
    folder = hub_snapshot(given)
    return Source(given, folder, folder.name)


def open_base(run: Run, source: Source) -> Base:
    """Load a backbone, compare packed scores with its own forward on a prompt with a full history, and identify it.

    Raises:
        BackboneError, TokenizerError: it cannot be loaded or cannot score.
    """
    backbone = load_backbone(source.folder, device=str(run.device))
    template = Template(run.config.template, backbone.encoder)
    worst = probe(backbone, template, run.config.template.history_tokens)
    run.say(f"backbone {source.name}: packed scores equal its own to {worst:.1g} logits")
    inside = source.name == BACKBONE  # the bundle gets the files unchanged
    definition = Definition.read(source.folder) if inside else backbone.definition()
    _check_definition(definition, source, backbone.encoder)
    return Base(source, definition.identify(backbone.weights_id()), definition, backbone.encoder)


def opened_before_the_run(run: Run, given: str) -> Base:
    """Find and open a backbone before the run folder is claimed."""
    with run.accelerator.main_process_first():  # one process downloads and converts
        source = find_backbone(given)
    return open_base(run, source)


def made_by_the_run(run: Run, folder: Path) -> Base:
    """Open the `tiny` backbone that the run has made; the bundle will hold its weights."""
    return open_base(run, Source(BACKBONE, folder))


def _check_definition(definition: Definition, source: Source, encoder: TextEncoder) -> None:
    """Refuse a tokenizer that changes when it is saved: serving would read other tokens from the bundle's copy."""
    with tempfile.TemporaryDirectory() as scratch:
        definition.write(Path(scratch))
        try:
            again = TextEncoder(load_tokenizer(Path(scratch)))
        except (OSError, ValueError) as error:
            raise BackboneError(
                f"backbone {source.name}: its tokenizer cannot be saved: {first_line(error)}"
            ) from error
    if again.fingerprint != encoder.fingerprint:
        raise BackboneError(
            f"backbone {source.name}: its tokenizer reads text differently after it was saved as tokenizer.json; give a"
            " folder with a tokenizer.json of its own"
        )
