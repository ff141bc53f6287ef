"""How a case is measured: requests one after the other, each with its own candidates, for a while."""

import resource
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from loadtests.bench.scorers import BATCH_TOKENS, Scorer
from loadtests.bench.shapes import ModelShape, PromptShape, request
from models.backbone import DTYPES

LEAST_REQUESTS, MOST_REQUESTS = 3, 200
SLOW_S = 20.0  # of a request that takes longer, one is enough


@dataclass(frozen=True, slots=True)
class Case:
    """One cell of the table."""

    shape: PromptShape
    candidates: int
    user_cache: str  # cold: each request is a new user's; warm: all are of one user


@dataclass(frozen=True, slots=True)
class Row:
    """One line of bench.json. `matrix_fraction`: of the time, what the linear layers' products alone would take."""

    model: str
    dtype: str
    device: str
    shape: str
    candidates: int
    scorer: str
    variant: str  # fp8, compiled, or empty
    user_cache: str
    requests: int
    candidates_per_second: float
    p50_ms: float
    p99_ms: float
    tokens_computed: int  # of one request
    peak_memory_bytes: int  # of the process so far; on a GPU of the device in this case
    matrix_fraction: float | None
    scores: list[float]  # of the first request, to compare scorers by

    def as_json(self) -> dict[str, object]:
        """Return what bench.json holds."""
        return {name: value for name, value in asdict(self).items() if name != "scores"}


class Measurer:
    """Measures one scorer of one model on one device."""

    def __init__(self, scorer: Scorer, name: str, model: ModelShape, device: str, seconds: float) -> None:
        self._scorer, self._name, self._model, self._device = scorer, name, model, device
        self._seconds = seconds

    def warm_up(self, shape: PromptShape) -> None:
        """Score one small request that is not counted."""
        self._scorer.score(request(self._model, shape, 2, user=10**6, draw=0))

    def measure(self, case: Case) -> Row:
        """Measure a case."""
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if case.user_cache == "warm":
            self._score(case, 0)
        first_scores: NDArray[np.float32] | None = None
        before, seconds = self._scorer.tokens(), list[float]()
        started = time.perf_counter()
        while not seconds or self._go_on(len(seconds), time.perf_counter() - started):
            taken, scores = self._score(case, 1 + len(seconds))
            seconds.append(taken)
            first_scores = scores if first_scores is None else first_scores
        tokens = (self._scorer.tokens() - before) // len(seconds)
        assert first_scores is not None
        return Row(
            model=self._model.name,
            dtype=self._model.dtype,
            device=self._device,
            shape=case.shape.name,
            candidates=case.candidates,
            scorer=self._name.partition("-")[0],
            variant=self._name.partition("-")[2],
            user_cache=case.user_cache,
            requests=len(seconds),
            candidates_per_second=case.candidates * len(seconds) / sum(seconds),
            p50_ms=1000 * float(np.percentile(seconds, 50)),
            p99_ms=1000 * float(np.percentile(seconds, 99)),
            tokens_computed=tokens,
            peak_memory_bytes=_peak_memory(self._device),
            matrix_fraction=matrix_seconds(self._model, tokens, self._device) / float(np.median(seconds)),
            scores=first_scores.tolist(),
        )

    def _go_on(self, requests: int, elapsed: float) -> bool:
        """Whether a case needs more requests."""
        if elapsed / requests > SLOW_S:
            return False
        return requests < LEAST_REQUESTS or (requests < MOST_REQUESTS and elapsed < self._seconds)

    def _score(self, case: Case, draw: int) -> tuple[float, NDArray[np.float32]]:
        """Score a case's request number `draw`, the same for every scorer."""
        of_case = 1000 * case.candidates + (0 if case.user_cache == "warm" else draw)
        group = request(self._model, case.shape, case.candidates, of_case, draw)
        started = time.perf_counter()
        scores = self._scorer.score(group)
        return time.perf_counter() - started, scores


def matrix_seconds(model: ModelShape, tokens: int, device: str) -> float:
    """Return how long the matrix products of every linear layer take for so many tokens, at the layers' own sizes."""
    rows = min(tokens, BATCH_TOKENS)
    head = model.d_model // model.heads
    shared = model.shared_heads * head
    dtype = DTYPES[model.dtype]
    one_layer = sum(
        count * _product_seconds(rows, inner, outer, dtype, device)
        for inner, outer, count in (
            (model.d_model, model.d_model, 2),  # queries, output
            (model.d_model, shared, 2),  # keys, values
            (model.d_model, model.d_inner, 2),  # gate, up
            (model.d_inner, model.d_model, 1),  # down
        )
    )
    return model.layers * one_layer * tokens / rows


def _product_seconds(rows: int, inner: int, outer: int, dtype: torch.dtype, device: str) -> float:
    x = torch.randn(rows, inner, device=device).to(dtype)
    weight = torch.randn(outer, inner, device=device).to(dtype)
    times = []
    for _ in range(8):
        _wait(device)
        started = time.perf_counter()
        repeats = 10 if device == "cuda" else 1  # a launch takes as long as a small product
        for _ in range(repeats):
            torch.nn.functional.linear(x, weight)
        _wait(device)
        times.append((time.perf_counter() - started) / repeats)
    return float(np.median(times[1:]))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_memory(device: str) -> int:
    """Return the most that this process and its children have held, each at its own worst moment."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import psutil  # here, because a lent GPU machine needs torch and transformers alone

    own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return own + sum(_peak_of(child.pid) for child in psutil.Process().children(recursive=True))


def _peak_of(pid: int) -> int:
    with suppress(FileNotFoundError, StopIteration):  # gone, or going
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return 0


def cases(shapes: Sequence[PromptShape], candidates: Sequence[int], caches: Sequence[str]) -> list[Case]:
    """Return the cases of the table, the small ones first. An empty `candidates` takes each shape's own."""
    found = [
        Case(shape, count, cache) for shape in shapes for count in candidates or shape.candidates for cache in caches
    ]
    return sorted(found, key=lambda case: case.candidates * case.shape.candidate_tokens)
