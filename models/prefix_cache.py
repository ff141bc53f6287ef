"""Keys and values of prompt beginnings, kept under a byte budget.

A trunk is cut into chunks of a fixed number of tokens, the last one shorter. A chunk's name is the hash of what its
keys and values depend on: the weights, their type, and every token id and spliced vector from the prompt's first token
to the chunk's last. So equal text with different vectors never shares, an instruction is kept once for all users, and a
trunk that grew at its end is extended, not computed again.

Shapes: P tokens of a beginning, L layers, J key/value heads, E dimensions of a head.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from models.segments import Segment

CHUNK_TOKENS = 16  # of a history that grew, fewer tokens than this are computed again


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """What a cache has done and holds."""

    tokens_found: int
    tokens_missed: int
    bytes_held: int


def chunk_names(identity: str, trunk: Segment, slot_bytes: Sequence[bytes]) -> list[bytes]:
    """Return the name of each chunk of a trunk, first to last.

    `identity` stands for the weights and their type, `slot_bytes` holds the bytes of the vector behind each slot.
    """
    slots = sorted((index, kind, vector) for (kind, index), vector in zip(trunk.slots, slot_bytes, strict=True))
    name = hashlib.sha256(identity.encode()).digest()
    names = []
    for start in range(0, len(trunk), CHUNK_TOKENS):
        end = min(start + CHUNK_TOKENS, len(trunk))
        digest = hashlib.sha256(name)
        digest.update(repr(trunk.token_ids[start:end]).encode())
        for index, kind, vector in slots:
            if start <= index < end:
                digest.update(f"{index} {kind} {len(vector)} ".encode())
                digest.update(vector)
        name = digest.digest()
        names.append(name)
    return names


class PrefixCache:
    """An LRU of chunks. Safe to share between threads; what it returns is never written to again."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._chunks: OrderedDict[bytes, Tensor] = OrderedDict()  # (L, 2, J, chunk's tokens, E)
        self._lock = Lock()
        self._bytes = self._found = self._missed = 0

    @property
    def counts(self) -> CacheCounts:
        """What the cache has done and holds."""
        with self._lock:
            return CacheCounts(self._found, self._missed, self._bytes)

    def find(self, names: Sequence[bytes], trunk_tokens: int) -> Tensor | None:
        """Return the keys and values of the longest kept beginning, (L, 2, J, P, E), or None."""
        with self._lock:
            found = []
            for name in names:
                chunk = self._chunks.get(name)
                if chunk is None:
                    break
                found.append(chunk)
            self._touch(names[: len(found)])
            tokens = sum(chunk.shape[3] for chunk in found)
            self._found += tokens
            self._missed += trunk_tokens - tokens
        return torch.cat(found, dim=3) if found else None

    def keep(self, names: Sequence[bytes], start: int, computed_L2JAE: Tensor) -> None:
        """Keep the newly computed end of a trunk whose first `start` tokens were found."""
        if computed_L2JAE.nbytes > self._budget:
            return  # it would drive out all the rest, and then itself
        pieces = computed_L2JAE.split(CHUNK_TOKENS, dim=3)
        with self._lock:
            for name, piece in zip(names[start // CHUNK_TOKENS :], pieces, strict=True):
                if name not in self._chunks:
                    # A copy, so that a chunk does not keep the memory of the whole trunk.
                    self._chunks[name] = piece.clone()
                    self._bytes += piece.nbytes
            self._touch(names)
            while self._bytes > self._budget:
                _, dropped = self._chunks.popitem(last=False)
                self._bytes -= dropped.nbytes

    def clear(self) -> None:
        """Drop every chunk."""
        with self._lock:
            self._chunks.clear()
            self._bytes = 0

    def _touch(self, names: Sequence[bytes]) -> None:
        """Make these the most recent, a beginning more so than what follows it, which is of no use without it."""
        for name in reversed(names):
            if name in self._chunks:
                self._chunks.move_to_end(name)
