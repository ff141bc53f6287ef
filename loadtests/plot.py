"""Latency against load, as a picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from loadtests.records import Summary


def plot_capacity(path: Path, steps: Sequence[tuple[float, Summary]], capacity: float, limit_ms: float) -> None:
    """Draw quantiles of latency and the goodput over the offered rate."""
    steps = sorted(steps, key=lambda step: step[0])
    rates = [rate for rate, _ in steps]
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for name in ("p50", "p95", "p99"):
        points = [(rate, getattr(one, f"{name}_ms")) for rate, one in steps]
        known = [(rate, value) for rate, value in points if value is not None]
        above.plot(*zip(*known, strict=True) if known else ((), ()), marker="o", label=f"{name} of scored requests")
    above.axhline(limit_ms, color="grey", linestyle="--", label=f"limit {limit_ms:g} ms")
    above.set(ylabel="latency from the scheduled arrival, ms", yscale="log")
    below.plot(rates, [one.goodput for _, one in steps], marker="o", color="black", label="goodput")
    below.plot(rates, rates, color="grey", linestyle=":", label="offered")
    below.set(xlabel="offered requests a second", ylabel="scored within the limit, /s", xscale="log")
    for axis in (above.yaxis, below.xaxis):  # 200, not 2 x 10^2
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(ScalarFormatter())
    for axes in (above, below):
        axes.axvline(capacity, color="green", alpha=0.5, label=f"capacity {capacity:.3g}/s")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
