"""`python -m loadtests.bench`: every scorer on the same weights and requests, one after the other, in one run."""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from loadtests.bench.child import Job
from loadtests.bench.measure import Row
from loadtests.bench.report import SCORERS, lines, write
from loadtests.bench.shapes import MODELS, SHAPES


def main() -> None:
    """Run the benchmark."""
    options = _options()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="sella-bench-") as scratch:
        for model in options.models:
            weights = None
            if options.device == "cpu":
                weights = str(Path(scratch) / model)
                _run_child(options, "weights", model, weights, Path(scratch))
            for scorer in SCORERS:
                if scorer in options.scorers:
                    print(f"{model}: {scorer}", flush=True)
                    rows += _run_child(options, scorer, model, weights, Path(scratch))
    print("\n".join(lines(rows)))
    if options.out is not None:
        for path in write(rows, options.out):
            print(f"wrote {path}")


def _run_child(options: argparse.Namespace, scorer: str, model: str, weights: str | None, scratch: Path) -> list[Row]:
    out = scratch / "rows"
    out.write_text("")
    job = Job(
        scorer=scorer,
        model=model,
        shapes=options.shapes,
        candidates=options.candidates,
        device=options.device,
        threads=options.threads,
        weights=weights,
        out=str(out),
        seconds=options.seconds,
        longest=options.longest,
    )
    told = scratch / "job.json"
    told.write_text(json.dumps(asdict(job)))
    python = options.vllm_python if scorer == "vllm" else sys.executable
    ended = subprocess.run([str(python), "-m", "loadtests.bench.child", str(told)], check=False)
    if ended.returncode:
        print(f"{model}: {scorer} ended with {ended.returncode}; its rows so far stand", file=sys.stderr)
    return [Row(**json.loads(line)) for line in out.read_text().splitlines()]


def _options() -> argparse.Namespace:
    # argparse, because a lent GPU machine has torch and transformers alone.
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["tiny", "qwen2-0.5b"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--candidates", nargs="+", type=_positive, default=[], help="instead of the shapes' own")
    parser.add_argument("--scorers", nargs="+", choices=SCORERS, default=list(SCORERS[:4]))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=_positive, default=None, help="CPU threads; torch's own choice if not given")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each case, after three requests")
    parser.add_argument("--longest", type=float, default=120.0, help="leave out what takes a request longer, seconds")
    parser.add_argument("--vllm-python", type=Path, default=Path(".venv-vllm/bin/python"), help="its environment")
    parser.add_argument("--out", type=Path, default=None, help="folder for bench.json and bench.png")
    options = parser.parse_args()
    if "vllm" in options.scorers and (options.device != "cpu" or not options.vllm_python.exists()):
        print("vLLM is left out: `make test-vllm` installs it, for the CPU alone", file=sys.stderr)
        options.scorers = [one for one in options.scorers if one != "vllm"]
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


if __name__ == "__main__":
    main()
