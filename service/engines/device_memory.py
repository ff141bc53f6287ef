"""How much memory an engine's device has and how much of it is in use, as its worker process sees it."""

from pathlib import Path

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes in use and the bytes there are: of a GPU by all processes, of a CPU's memory by this one."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free, total
    return int(psutil.Process().memory_info().rss), host_memory()[1]


def host_memory() -> tuple[int, int]:
    """Return the bytes of memory that this process and its children may still take, and how many there are in all.

    A container's limit (cgroup v2) counts where it is lower. What is kept of files counts as free.
    """
    memory = psutil.virtual_memory()
    free, total = int(memory.available), int(memory.total)
    for folder in _cgroups():
        limit = _number(folder / "memory.max")
        if limit is not None:
            used = (_number(folder / "memory.current") or 0) - _cached_files(folder / "memory.stat")
            free, total = min(free, max(0, limit - used)), min(total, limit)
    return free, total


def _cgroups() -> list[Path]:
    """Return this process's cgroup and those around it; none where there is no cgroup v2."""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return []
    folder = CGROUPS / own
    return [folder, *(one for one in folder.parents if one == CGROUPS or CGROUPS in one.parents)]


def _number(path: Path) -> int | None:
    """Return a file's number; None where there is no file, or no limit."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cached_files(path: Path) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
