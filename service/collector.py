"""Python's garbage collector, kept from walking through the tables while requests wait."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# A full collection that takes longer has met the tables of a bundle. Without them it takes some milliseconds.
LONG_S = 0.05


def freeze_tables() -> None:
    """Take everything that is loaded now out of later collections, and what a later bundle loads after its first one.

    A full collection with a million items takes half a second, in which no request goes on. What is frozen is still
    freed when nothing refers to it; only cycles are kept, so a bundle must have none.
    """
    gc.collect()
    gc.freeze()
    if _freeze_after_long not in gc.callbacks:
        gc.callbacks.append(_freeze_after_long)


@contextmanager
def no_collections() -> Iterator[None]:
    """Load something large without any collection, and freeze it at the end."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


_began = 0.0


def _freeze_after_long(phase: str, info: dict[str, Any]) -> None:
    global _began  # a collection has no other place, and there is one collector in a process
    if info["generation"] < 2:
        return
    if phase == "start":
        _began = time.perf_counter()
    elif time.perf_counter() - _began > LONG_S:
        gc.freeze()
