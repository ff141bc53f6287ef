"""Several processes, and processes that die: as a user runs `fit`, on a CPU, in float32."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from models.bundle import verify
from tests.training.micro import MICRO, SIZES
from training.data.synthetic import SyntheticConfig, write_synthetic
from training.run import read_tensors

FIT = ("-m", "training.cli", "fit")
# Two processes add the same numbers in another order, and Adam divides by the root of tiny second moments.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit") / "data"
    write_synthetic(folder, SyntheticConfig(**SIZES))
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro configuration without autocast, saving after every step, with rates that move every stage."""
    path = tmp_path_factory.mktemp("config") / "micro.json"
    path.write_text(json.dumps({**MICRO, "autocast": False, "checkpoint_seconds": 1e-9}))
    return path


def arguments(data: Path, config: Path, out: Path) -> list[str]:
    return ["--data", str(data), "--config", str(config), "--out", str(out), "--backbone", "tiny"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="module")
def single(data: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of one process that was never interrupted."""
    out = tmp_path_factory.mktemp("single") / "bundle"
    subprocess.run([sys.executable, *FIT, *arguments(data, config, out)], env=environment(), check=True)
    return out


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def run_folder(bundle: Path) -> Path:
    return bundle.with_name(f"{bundle.name}.run")


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, one in ours.items():
        assert float((one.double() - theirs[name].double()).abs().max()) <= TOLERANCE, name


def test_two_processes_train_what_one_does(data: Path, config: Path, single: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    # `accelerate launch --cpu` starts one process whatever it is asked for; torchrun is what starts two without a GPU.
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command = [sys.executable, *launch, *FIT, *arguments(data, config, out)]
    subprocess.run(command, env=environment(), check=True)
    charts = list(run_folder(out).glob("tensorboard/adapt/*"))
    for stage in ("pretrain", "adapt", "align", "project"):
        ours, state = read_tensors(run_folder(out) / f"{stage}.safetensors")
        theirs, expected = read_tensors(run_folder(single) / f"{stage}.safetensors")
        assert state["step"] == expected["step"] > 5
        assert [one["step"] for one in state["evaluations"]] == [one["step"] for one in expected["evaluations"]]
        # The last parameters as well as the best, and the optimizer's moments.
        assert_close(ours, theirs)
    for name in ("collab", "semantic", "projection", "adapter/adapter_model", "backbone/model"):
        assert_close(load_file(out / f"{name}.safetensors"), load_file(single / f"{name}.safetensors"))
    assert len(charts) == 1, "only the main process draws"


def steps_taken(run: Path) -> list[str]:
    """Return the files a run has left so far: how far it came."""
    return sorted(str(path.relative_to(run)) for path in run.rglob("*.safetensors")) if run.exists() else []


def test_a_fit_killed_again_and_again_ends_in_the_same_bundle(
    data: Path, config: Path, single: Path, tmp_path: Path
) -> None:
    out = tmp_path / "elsewhere" / "bundle"
    rng = random.Random(os.getpid())
    kills = 0
    # Each life goes on for a random moment after it has left something new, so that none is in vain.
    for attempt in range(4):
        before = steps_taken(run_folder(out))
        command = [sys.executable, *FIT, *arguments(data, config, out), *(["--resume"] if attempt else [])]
        process = subprocess.Popen(command, env=environment())
        while process.poll() is None and steps_taken(run_folder(out)) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.0))
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
        if out.exists():
            break
    assert kills >= 2
    if not out.exists():
        subprocess.run([sys.executable, *FIT, *arguments(data, config, out), "--resume"], env=environment(), check=True)
    assert verify(out).bundle_id == verify(single).bundle_id
    assert not list(out.parent.glob(".*")), "no scratch is left"
