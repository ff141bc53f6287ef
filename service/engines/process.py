"""A worker process as its parent sees it: started, written to, read from, killed, the event loop never waiting."""

import asyncio
import atexit
import multiprocessing
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from threading import Thread

from service import interpreter
from service.engines import boot
from service.engines.worker import ModelSource


class WorkerProcess:
    """One worker process with its pipe. Reading and writing block, so each has a thread."""

    def __init__(self, process: "subprocess.Popen[bytes]", pipe: Connection) -> None:
        self._process = process
        self._pipe = pipe
        self._loop = asyncio.get_running_loop()
        self._inbox: asyncio.Queue[object] = asyncio.Queue()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="engine writer")
        self._reader = Thread(target=self._read, name="engine reader", daemon=True)
        self._reader.start()
        self.killed_because = ""

    @classmethod
    async def start(cls, source: ModelSource, *, gently: bool = False) -> "WorkerProcess":
        """Start a fresh interpreter: a fork would share torch's threads and locks.

        Nor is it one of `multiprocessing`, which imports our own main module in it before anything else: `gently` means
        that imports, too, give way to whoever computes.
        """
        ours, theirs = multiprocessing.Pipe()
        starting = asyncio.ensure_future(asyncio.to_thread(_start, theirs.fileno(), gently))
        try:
            process = await asyncio.shield(starting)
        except asyncio.CancelledError:
            with suppress(OSError):
                _end(await starting)
            ours.close()
            raise
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        worker = cls(process, ours)
        worker.send(source)
        return worker

    @property
    def pid(self) -> int | None:
        """The process id."""
        return self._process.pid

    def send(self, message: object) -> None:
        """Send without waiting; a worker that is gone is noticed by the reader."""
        self._writer.submit(self._write, message)

    async def next_message(self) -> object | None:
        """Return the worker's next message, or None at its end."""
        return await self._inbox.get()

    def abort(self, reason: str) -> None:
        """Kill the process; its end then comes through the pipe."""
        self.killed_because = reason
        self._process.kill()

    async def kill(self) -> None:
        """Kill the process if it still runs, and free everything."""
        self._process.kill()
        await asyncio.shield(asyncio.to_thread(self._free))

    def _free(self) -> None:
        _end(self._process)
        self._reader.join()
        self._writer.shutdown(wait=True, cancel_futures=True)
        self._pipe.close()

    def _write(self, message: object) -> None:
        try:
            self._pipe.send(message)
        except OSError:
            pass  # the reader notices
        except Exception as error:  # a message that cannot be sent would never be answered
            self.abort(f"a message could not be sent: {error}")

    def _read(self) -> None:
        message: object | None = None
        while True:
            try:
                message = self._pipe.recv()
            except (EOFError, OSError):
                message = None
            except Exception as error:  # what cannot be read may have been any answer
                self.abort(f"a message could not be read: {error}")
                message = None
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._inbox.put_nowait, message)
            if message is None:
                return


def _start(pipe: int, gently: bool) -> "subprocess.Popen[bytes]":
    command = interpreter.command(boot.__name__, str(pipe), *([boot.GENTLY] if gently else []))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[pipe], env=interpreter.environment())
    atexit.register(process.kill)  # where nobody comes to close it
    return process


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    atexit.unregister(process.kill)
