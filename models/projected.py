"""What stands in a prompt's slots: projected vectors, each computed once: catalogue items recur in every request.

Shapes: K vectors asked for, X their width, M vectors that fit, D = d_L.
"""

import hashlib
from collections import OrderedDict
from threading import Lock

import numpy as np
import torch
from torch import Tensor, nn

from models.packs import Floats
from models.projection import Projections

PROJECTED_BYTES = 64 * 2**20  # each projection's: 4,681 vectors of Qwen2-7B in fp32, the longest request several times


class SlotVectors:
    """Both projections of one bundle. `identity` names them and the weights: what keys and values depend on."""

    def __init__(self, projections: Projections, identity: str, width: int, like: Tensor) -> None:
        """`like` gives the dtype and device of the outputs, `width` is D."""
        self.identity = identity
        self.projections = projections = projections.to(like.device).eval()
        self.collab = ProjectedRows(projections.collab, width, like, PROJECTED_BYTES)
        self.warm = ProjectedRows(projections.warm, width, like, PROJECTED_BYTES)

    def clear(self) -> None:
        """Drop every vector kept."""
        self.collab.clear()
        self.warm.clear()


class ProjectedRows:
    """A projection behind an LRU of its outputs, named by a hash of the vectors. Safe to share between threads."""

    def __init__(self, projection: nn.Module, width: int, like: Tensor, budget_bytes: int) -> None:
        """`like` gives the dtype and device of the outputs, `width` is D."""
        self._projection = projection
        self._like = like
        self._table_MD: Tensor | None = None  # made at the first use, so that who never scores pays nothing
        self._shape = (max(1, budget_bytes // (width * like.element_size())), width)
        self._rows: OrderedDict[bytes, int] = OrderedDict()
        self._lock = Lock()

    def __call__(self, vectors_KX: Floats) -> Tensor:
        """Return the projected vectors, (K, D)."""
        names = [hashlib.sha256(vector.tobytes()).digest() for vector in vectors_KX]
        first = {name: index for index, name in reversed(list(enumerate(names)))}
        if len(first) > self._shape[0]:
            return self._project(vectors_KX)
        with self._lock:
            if self._table_MD is None:
                self._table_MD = torch.empty(self._shape, dtype=self._like.dtype, device=self._like.device)
            for name in first:
                if name in self._rows:
                    self._rows.move_to_end(name)
            missing = [name for name in first if name not in self._rows]
            if missing:
                projected = self._project(vectors_KX[[first[name] for name in missing]])
                self._table_MD[[self._place(name) for name in missing]] = projected
            # Read under the lock: another thread may give a place away.
            return self._table_MD[[self._rows[name] for name in names]]

    def clear(self) -> None:
        """Drop every row, and the memory of all."""
        with self._lock:
            self._rows.clear()
            self._table_MD = None

    def _place(self, name: bytes) -> int:
        """Give a vector the next free place, or the place of the one unused for longest."""
        full = len(self._rows) == self._shape[0]
        place = self._rows.popitem(last=False)[1] if full else len(self._rows)
        self._rows[name] = place
        return place

    def _project(self, vectors_KX: Floats) -> Tensor:
        vectors = torch.from_numpy(np.ascontiguousarray(vectors_KX)).to(self._like.device)
        out: Tensor = self._projection(vectors).to(self._like.dtype)
        return out
