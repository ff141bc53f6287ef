"""What a run of the benchmark leaves: a table, bench.json, a plot."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from loadtests.bench.measure import Row

SCORERS = ("reference", "naive", "vllm", "packed", "packed-compiled", "packed-fp8")
COLUMNS = (
    f"{'model':11} {'shape':11} {'cand.':>6} {'cache':5} {'scorer':15} {'n':>4} {'cand./s':>9} {'p50 ms':>9}"
    f" {'p99 ms':>9} {'tokens':>7} {'peak MB':>8} {'matrix':>7} {'ratios':>20} {'worst dp':>9}"
)


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table, a case's scorers together, each with how many times faster packed is."""
    yield COLUMNS
    for case in dict.fromkeys(map(case_of, rows)):
        of_case = sorted((row for row in rows if case_of(row) == case), key=lambda row: SCORERS.index(name_of(row)))
        truth = truth_of(rows, case)
        for row in of_case:
            yield _line(row, _ratios(row, rows), truth)
        yield ""


def case_of(row: Row) -> tuple[str, str, int, str]:
    """Return what rows of one comparison have in common."""
    return row.model, row.shape, row.candidates, row.user_cache


def name_of(row: Row) -> str:
    """Return the scorer with its variant."""
    return f"{row.scorer}-{row.variant}" if row.variant else row.scorer


def truth_of(rows: Sequence[Row], case: tuple[str, str, int, str]) -> np.ndarray | None:
    """Return the scores to compare a case with: the reference's, or where it was too slow naive batches'."""
    for scorer in ("reference", "naive"):
        for row in rows:
            if row.scorer == scorer and case_of(row) == case:
                return np.array(row.scores)
    return None


def _ratios(row: Row, rows: Sequence[Row]) -> str:
    """Tell a packed row's speed in times each other's; one without this cache is compared with its cold figure."""
    if row.scorer != "packed":
        return ""
    others = []
    for scorer in ("naive", "vllm"):
        same = [one for one in rows if one.scorer == scorer and case_of(one)[:3] == case_of(row)[:3]]
        same = [one for one in same if one.user_cache == row.user_cache] or same
        if same:
            others.append(f"{row.candidates_per_second / same[0].candidates_per_second:.1f}x {scorer}")
    return " ".join(others)


def _line(row: Row, ratios: str, truth: np.ndarray | None) -> str:
    fraction = "" if row.matrix_fraction is None else f"{row.matrix_fraction:.0%}"
    worst = "" if truth is None else f"{np.abs(np.array(row.scores) - truth).max():.1e}"
    return (
        f"{row.model:11} {row.shape:11} {row.candidates:6} {row.user_cache:5} {name_of(row):15} {row.requests:4}"
        f" {row.candidates_per_second:9.1f} {row.p50_ms:9.1f} {row.p99_ms:9.1f} {row.tokens_computed:7}"
        f" {row.peak_memory_bytes / 1e6:8.0f} {fraction:>7} {ratios:>20} {worst:>9}"
    )


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write bench.json and, where matplotlib is installed, bench.png; return what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bench.json"
    path.write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n")
    plotted = plot(rows, folder / "bench.png")
    return [path, plotted] if plotted else [path]


def plot(rows: Sequence[Row], path: Path) -> Path | None:
    """Draw candidates a second against candidates of a request, a panel for each model."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row.model for row in rows))
    figure, axes = pyplot.subplots(1, len(models), figsize=(5 * len(models), 4), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for scorer in SCORERS:
            for cache, style in (("cold", "-"), ("warm", "--")):
                points = [
                    (row.candidates, row.candidates_per_second)
                    for row in rows
                    if (row.model, row.shape, name_of(row), row.user_cache) == (model, "ten-titles", scorer, cache)
                ]
                if points:
                    x, y = zip(*sorted(points), strict=True)
                    axis.plot(x, y, style, marker="o", color=f"C{SCORERS.index(scorer)}", label=f"{scorer}, {cache}")
        axis.set(xscale="log", yscale="log", title=model, xlabel="candidates a request", ylabel="candidates a second")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
