"""The hashes of a folder's files, by a process of its own at a low priority.

Hashing gigabytes must not slow down who serves. A nice thread of the server would not do: while it holds the
interpreter's lock and waits for its turn on a core, the event loop waits for it. Here the standard library alone is
imported, so that the process costs little.
"""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from service import interpreter

GENTLE = 10  # a tenth of what a thread of normal priority gets


async def hashes_of(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of a folder, by its relative path; what cannot be read is missing.

    Raises:
        OSError: no process to be had, or it was killed.
    """
    process = await asyncio.create_subprocess_exec(
        *interpreter.command(__name__, str(folder)),
        env=interpreter.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    try:
        told, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise OSError(f"{folder}: the process that hashes it ended with status {process.returncode}")
    hashes: dict[str, str] = json.loads(told)
    return hashes


def main() -> None:
    """Write the hashes of the folder in the first argument as a line of JSON."""
    os.nice(GENTLE)
    folder = Path(sys.argv[1])
    hashes = {}
    for path in filter(Path.is_file, sorted(folder.rglob("*"))):  # a pipe would never end
        with suppress(OSError), path.open("rb") as file:
            hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    print(json.dumps(hashes))


if __name__ == "__main__":
    main()
