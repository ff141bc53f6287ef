"""What runs inside vLLM's own processes: they end with the service.

vLLM's engine core does not notice its parent's death, and would keep its memory for ever. Each process of vLLM that
computes looks up a class to add to its worker's, before it loads; looking it up here binds the process to the service.
Where the engine core leaves the computing to workers, their death ends it.
"""

import os
import select
from contextlib import suppress
from threading import Thread
from typing import Any

EXTENSION = f"{__name__}.BoundToService"
SERVICE_PID = "_SELLA_SERVICE_PID"  # a word from the service to these processes, and no setting


def __getattr__(name: str) -> Any:
    """Return the worker's extension, which adds nothing, and bind this process."""
    if name != "BoundToService":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    pid = int(os.environ[SERVICE_PID])
    if pid != os.getpid():
        Thread(target=_end_with, args=(pid,), name="service watch", daemon=True).start()
    return type(name, (), {})


def _end_with(pid: int) -> None:
    """Wait for a process's end without polling, and end this one too, whatever it computes."""
    with suppress(ProcessLookupError):  # it ended before it could be watched
        select.select([os.pidfd_open(pid)], [], [])
    os._exit(1)
