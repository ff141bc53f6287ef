"""Several processes of one run, started as `torchrun` starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ALONE = """
import sys, time
from datetime import timedelta
from pathlib import Path
from training import start
from training.config import Config

if sys.argv[2] != "own":
    start.WAIT_FOR_OTHERS = timedelta(seconds=float(sys.argv[2]))
run = start.new_run(Path(sys.argv[1]), Config())
assert run.accelerator.num_processes == 2
run.accelerator.wait_for_everyone()
if run.is_main:
    time.sleep(8)
run.accelerator.wait_for_everyone()
if run.is_main:
    print("together again", start.WAIT_FOR_OTHERS.days)
"""


@pytest.mark.parametrize("limit", ["own", "2"])
def test_processes_wait_as_long_as_the_main_one_works_alone(tmp_path: Path, limit: str) -> None:
    """Stage 2 and the scoring of valid are the main process's: by torch's limit the others give up after minutes."""
    (tmp_path / "alone.py").write_text(ALONE)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [sys.executable, *launch, str(tmp_path / "alone.py"), str(tmp_path), limit],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if limit == "own":
        assert "together again 7" in done.stdout, done.stderr
    else:  # the limit is the one that counts: with a short one they do give up
        assert done.returncode != 0 and "together again" not in done.stdout
