"""Where a worker process begins: it loads in a thread that gives way to everything else, then serves in its main one.

A bundle is loaded while another serves on the same cores. Niceness belongs to a thread on Linux, and cannot be taken
back without privileges: so the nice thread loads, ends, and the one that computes was never nice. Nothing large is
imported here, because imports are a good part of the work.
"""

import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.engines.worker import WorkerModel

GENTLY = "gently"
GENTLE = 10  # a tenth of what a thread of normal priority gets: on cores that are all busy the load still ends


def main() -> None:
    """Be a worker process whose pipe is the file descriptor in the first argument, until the pipe ends."""
    # Ctrl-C and a service manager's SIGTERM reach the whole group; the parent drains first, and then closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    load = _Load(connection, gently=GENTLY in sys.argv[2:])
    load.start()
    load.received.wait()
    from service.engines.worker import Inbox, serve

    inbox = Inbox(connection)  # from now on the pipe's end ends this process, whatever it does
    load.join()
    if load.model is not None:
        serve(connection, load.model, inbox)


class _Load(threading.Thread):
    """Receives the model's source and opens it."""

    def __init__(self, connection: Connection, *, gently: bool) -> None:
        super().__init__(name="load", daemon=True)
        self._connection = connection
        self._gently = gently
        self.received = threading.Event()
        self.model: WorkerModel | None = None

    def run(self) -> None:
        if self._gently:
            os.nice(GENTLE)  # of this thread alone, on Linux
        from service.engines.worker import Broken

        try:
            source = self._connection.recv()  # imports what the source is made of
        except (EOFError, OSError):
            os._exit(0)  # the parent is gone
        except Exception as error:
            self._connection.send(Broken(f"{type(error).__name__}: {error}"))
            os._exit(1)
        self.received.set()
        try:
            model: WorkerModel = source.open(gently=self._gently)
            model.warm_up()
        except Exception as error:  # whatever it is, the parent tells it better than a traceback here
            self._connection.send(Broken(" ".join(str(error).split()) or type(error).__name__))
            return
        self.model = model


if __name__ == "__main__":
    main()
