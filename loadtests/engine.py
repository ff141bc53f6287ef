"""The engine alone, in this process: the same requests without HTTP, queue and worker.

Shapes: K candidates of a group.
"""

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from loadtests.workload import Ask
from models.assembly import history_window
from models.features import Floats
from models.loading import Bundle
from models.packs import ScoringGroup


class EngineAlone:
    """A bundle's model and tables, opened here."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        transformers_logging.disable_progress_bar()
        if threads is not None:
            torch.set_num_threads(threads)
        bundle = Bundle.open(folder)
        self._tables = bundle.tables()
        self._assembler = bundle.assembler(bundle.encoder(), self._tables)
        self._model = bundle.model()

    def group(self, ask: Ask) -> ScoringGroup:
        """Assemble a /rank request with stored history and known candidates, as the service would."""
        body = json.loads(ask.body)
        known = self._tables.user(body["user_id"])
        stored = known.history if known is not None else ()
        total = known.history_total if known is not None else 0
        window = history_window(stored, total, self._assembler.template)
        shown = [item for one in window if (item := self._tables.item(one)) is not None]
        candidates = [item for one in body["candidates"] if (item := self._tables.item(one)) is not None]
        return self._assembler.group(self._assembler.user(known, shown, total), candidates)

    def score(self, groups: Sequence[ScoringGroup], max_tokens: int) -> list[Floats]:
        """Return each group's logits, `(K,)`."""
        return self._model.logits(groups, max_tokens=max_tokens)

    def forward_s(self, group: ScoringGroup, max_tokens: int) -> float:
        """Score one group; return its seconds."""
        start = time.perf_counter()
        self.score([group], max_tokens)
        return time.perf_counter() - start

    def candidates_a_second(
        self, groups: Sequence[ScoringGroup], seconds: float, together: int, max_tokens: int
    ) -> float:
        """Go through the groups for `seconds`, so many at once; return the rate."""
        chunks = itertools.cycle([groups[first : first + together] for first in range(0, len(groups), together)])
        scored = 0
        start = time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            scored += sum(map(len, self.score(next(chunks), max_tokens)))
        return scored / passed
