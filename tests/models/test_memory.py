import platform
import subprocess
import sys

import pytest

STILL_HELD = """
import sys
from pathlib import Path
import torch
from models.memory import keep_freed_memory, release_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = resident()
held = [torch.ones(250_000) for _ in range(64)]
del held[:-1]  # the last tensor stays at the end of the heap
if sys.argv[2] == "release":
    release_freed_memory()
print((resident() - before) / 64_000_000)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has these settings")
def test_memory_that_is_freed_is_kept_for_the_next_forward_until_it_is_released() -> None:
    def share_held(how: str, then: str) -> float:
        command = [sys.executable, "-c", STILL_HELD, how, then]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert share_held("default", "") < 0.5 < share_held("keep", "")
    assert share_held("keep", "release") < 0.5
