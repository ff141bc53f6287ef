"""One scorer of one model, in a process of its own: so that peak memory is its own, and vLLM may have its environment.

    python -m loadtests.bench.child JOB.json

The job is a `Job` as JSON; rows go to its `out` file, a line each, as they are measured.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from loadtests.bench.measure import Measurer, Row, cases
from loadtests.bench.scorers import Naive, Packed, Reference, Scorer
from loadtests.bench.shapes import MODELS, SHAPES, ModelShape
from loadtests.bench.weights import load, save
from models.backbone import Backbone
from models.memory import keep_freed_memory
from models.projection import Projections


@dataclass(frozen=True, slots=True)
class Job:
    """What a child measures."""

    scorer: str
    model: str
    shapes: list[str]
    candidates: list[int]
    device: str
    threads: int | None
    weights: str | None  # folder; none makes the weights on the device
    out: str
    seconds: float  # for one case
    longest: float  # a case that is expected to take a request longer is left out, with a word


def main() -> None:
    """Be the child."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    if job.device == "cpu":
        keep_freed_memory()
    model = MODELS[job.model]
    if job.scorer == "weights":
        assert job.weights is not None
        save(model, Path(job.weights))
        return
    scorer, close = _open(job, model)
    try:
        _measure_all(job, model, scorer)
    finally:
        close()


def _measure_all(job: Job, model: ModelShape, scorer: Scorer) -> None:
    measurer = Measurer(scorer, job.scorer, model, job.device, job.seconds)
    shapes = [SHAPES[name] for name in job.shapes]
    measurer.warm_up(shapes[0])
    # Neither keeps anything of a user, so a warm cache would be the same figure again.
    caches = ["cold"] if job.scorer in ("reference", "naive") else ["cold", "warm"]
    # The reference is there to compare scores with, and naive batches do for that where it is slow.
    longest = job.longest / 4 if job.scorer == "reference" else job.longest
    largest: dict[str, Row] = {}  # the last case of each shape: what a larger one is estimated by
    with Path(job.out).open("w") as out:
        for case in cases(shapes, job.candidates, caches):
            before = largest.get(case.shape.name)
            expected = 0.0 if before is None else case.candidates / before.candidates_per_second
            if expected > longest:
                print(f"{job.scorer}, {case.candidates} candidates: left out, a request takes about {expected:.0f} s")
                continue
            largest[case.shape.name] = row = measurer.measure(case)
            out.write(json.dumps({**row.as_json(), "scores": row.scores}) + "\n")
            out.flush()


def _open(job: Job, model: ModelShape) -> tuple[Scorer, Callable[[], None]]:
    """Return the scorer, and what to call at the end."""
    weights = None if job.weights is None else Path(job.weights)
    if job.scorer == "vllm":
        from loadtests.bench.vllm_scorer import VllmScorer  # vLLM is in one environment alone

        assert weights is not None
        vllm = VllmScorer(model, weights)
        return vllm, vllm.close
    scorers: dict[str, Callable[[Backbone, Projections], Scorer]]
    scorers = {
        "reference": Reference,
        "naive": Naive,
        "packed": Packed,
        "packed-fp8": partial(Packed, fp8=True),
        "packed-compiled": partial(Packed, compiled=True),
    }
    return scorers[job.scorer](*load(model, weights, job.device)), lambda: None


if __name__ == "__main__":
    main()
