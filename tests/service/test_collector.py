"""The garbage collector does not walk through the tables, and frozen bundles are freed."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

from models.loading import Bundle
from service.bundles.handle import open_parts
from service.collector import freeze_tables

# Two million lists take some 50 ms of a collection; tables of a million items are half a second.
PROGRAM = """
import gc, time
from service import collector

collector.LONG_S = 0.005

def pause():
    began = time.perf_counter()
    gc.collect()
    return time.perf_counter() - began

table = [[] for _ in range(2_000_000)]
whole = pause()
collector.freeze_tables()
assert pause() < whole / 5
later = [[] for _ in range(2_000_000)]  # a bundle that is loaded afterwards costs one pause
pauses = [pause() for _ in range(3)]
assert max(pauses[1:]) < whole / 5, (whole, pauses)
"""


def test_tables_cost_one_long_collection(root: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_frozen_bundle_is_freed_by_its_last_reference(bundle: Bundle) -> None:
    parts = open_parts(Bundle.open(bundle.folder))
    held = [weakref.ref(one) for one in (parts.tables, parts.assembler, parts.bundle, parts.counts)]
    callbacks = gc.callbacks[:]
    try:
        freeze_tables()
        del parts
        assert [one() for one in held] == [None] * len(held)  # no cycle keeps them, as none would ever be found
    finally:
        gc.callbacks[:] = callbacks
        gc.unfreeze()
