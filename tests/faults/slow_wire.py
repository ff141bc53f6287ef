"""A wire between a service and its Redis that can be made slow."""

import socket
import threading
import time
from contextlib import suppress
from pathlib import Path


class SlowWire:
    """Passes bytes between its own Unix socket and another; replies wait `delay_s` first."""

    def __init__(self, target: Path) -> None:
        self.delay_s = 0.0
        self._target = target
        self.path = target.with_name("wire.sock")
        self.url = f"unix://{self.path}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(64)
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        """Close everything and wait for the threads."""
        for one in (self._listener, *self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for one in (self._listener, *self._open):
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            self._open += [near, far]
            try:
                far.connect(str(self._target))
            except OSError:  # Redis is down, and so is the wire to it
                near.close()
                far.close()
                continue
            for pair, slow in (((near, far), False), ((far, near), True)):
                thread = threading.Thread(target=self._pass, args=(*pair, slow))
                self._threads.append(thread)
                thread.start()

    def _pass(self, source: socket.socket, target: socket.socket, slow: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if slow:
                    time.sleep(self.delay_s)
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
