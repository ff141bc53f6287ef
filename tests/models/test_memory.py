import platform
import subprocess
import sys

import pytest

PAGE_FAULTS = """
import resource, sys
from models.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import torch
def work():
    for _ in range(20):
        torch.ones(4_000_000)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has these settings")
def test_memory_that_is_kept_is_not_cleared_again() -> None:
    def faults(how: str) -> int:
        out = subprocess.run([sys.executable, "-c", PAGE_FAULTS, how], capture_output=True, text=True, check=True)
        return int(out.stdout)

    assert faults("keep") * 10 < faults("default")
