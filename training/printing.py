"""Output of `sella-train`: data, stages and evaluations as tables and sentences."""

from datetime import datetime, timedelta
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from training.data.history import Histories
from training.data.summary import DataSummary

METRICS = ("auc", "uauc", "log_loss", "ece")


def show_summary(console: Console, summary: DataSummary) -> None:
    """Print the summary of the data: a table on a terminal, otherwise plain columns."""
    table = Table(box=SIMPLE_HEAD if console.is_terminal else None, title="Data", title_justify="left", pad_edge=False)
    table.add_column("split")
    for heading in ("rows", "users", "items", "positive", "user new", "item new", "tied", "rule matters"):
        table.add_column(heading, justify="right")
    table.add_column("from (UTC)")
    table.add_column("to (UTC)")
    for split in summary.splits:
        counts = [f"{number:,}" for number in (split.rows, split.users, split.items)]
        shares = [_percent(share) for share in (split.positives, split.new_users, split.new_items)]
        ties = [f"{number:,}" for number in (split.tied, split.rule_matters)]
        table.add_row(split.name, *counts, *shares, *ties, _moment(split.first), _moment(split.last))
    console.print(table)
    console.print(
        f"{summary.items:,} items in the catalogue, {summary.titles_cleaned:,} titles cleaned. New: not in train. Tied:"
        " rows that share user and timestamp with another row. Rule matters: rows to which --ties strict and file-order"
        " give different histories.",
        highlight=False,
    )


def show_ties(console: Console, histories: Histories, splits: list[str]) -> None:
    """If the rule `file-order` is chosen, print how many rows of each split it changes."""
    if histories.ties == "file-order":
        for split in splits:
            touched_B = histories.of_split(split).rule_matters
            console.print(
                f"ties file-order: {int(touched_B.sum()):,} of {len(touched_B):,} {split} rows get another history than"
                " by strict",
                soft_wrap=True,
                highlight=False,
            )


def show_stages(console: Console, report: dict[str, Any]) -> None:
    """Print the metrics of each stage on valid, and the difference of stage 3 to the other stages."""
    rows = f"on {report['stage rows']:,} rows of valid"
    table = Table(rows, "AUC", "UAUC", "stage 3 minus it, AUC (95 %)", title="Stages", title_justify="left")
    for name, reached in report["stages"].items():
        gap = report["stage 3 minus"].get(name, {}).get("auc")
        interval = "" if gap is None else one_line(gap, signed=True)
        table.add_row(name, number(reached["auc"]), number(reached["uauc"]), interval)
    console.print(table)


def show_precision(console: Console, report: dict[str, Any]) -> None:
    """Print how another number type changes the scores and metrics."""
    own, other = report["own"], report["other"]
    console.print(
        f"{report['split']}, {report['rows']} rows: AUC {number(own['auc'], 5)} in {own['dtype']},"
        f" {number(other['auc'], 5)} in {other['dtype']}; a score moves by at most {report['worst']:.2g}"
    )
    for name, one in report["difference"].items():
        interval = (
            "undefined" if one["value"] is None else (f"{one['value']:+.6f}  ({one['low']:+.6f} to {one['high']:+.6f})")
        )
        console.print(f"{name:9} {interval}")


def show_report(console: Console, split: str, report: dict[str, Any]) -> None:
    """Print an evaluation: the score on groups of rows, then its verdict."""
    table = Table(f"on {split}", "rows", "AUC", "UAUC", "log-loss", "ECE", title_justify="left")
    for name, label in {"all": "all", "warm": "warm", "cold": "cold", "history": "2 titles or more"}.items():
        cells = [_interval(report[name][metric]) for metric in METRICS]
        table.add_row(label, f"{report[name]['rows']:,}", *cells)
    console.print(table)
    show_verdict(console, split, report)


def show_verdict(console: Console, split: str, report: dict[str, Any]) -> None:
    """Print the metrics of the score and of every other scorer, and a sentence for each scorer that is better."""
    from training.report import verdict_sentences

    counts = "live counts" if report["live"] else "counts of train"
    table = Table(f"on {split}, {counts}", "AUC", "UAUC", "log-loss", "ECE", "score minus it, AUC")
    for name, measured in {"score": report["all"], **report["scorers"]}.items():
        gap = report["score minus"].get(name, {}).get("auc")
        cells = [_interval(measured["auc"]), *(_value(measured[metric]) for metric in METRICS[1:])]
        table.add_row(name, *cells, "" if gap is None else _interval(gap, signed=True))
    console.print(table)
    for name, reason in report.get("left out", {}).items():
        console.print(f"{name} is left out: {reason}.")
    if chosen := report.get("chosen on valid"):
        console.print(f"chosen on these rows: {', '.join(chosen)}.")
    for sentence in verdict_sentences(report, split):
        console.print(sentence)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _moment(seconds: float | None) -> str:
    moment = None if seconds is None else datetime(1970, 1, 1) + timedelta(seconds=seconds)
    return "–" if moment is None else moment.isoformat(" ", "minutes")


def one_line(found: dict[str, float | None], *, signed: bool = False) -> str:
    """Return a value and its interval on one line."""
    return _interval(found, signed=signed).replace("\n", " ")


def number(value: float | None, digits: int = 4) -> str:
    """Return a figure as text."""
    return "undefined" if value is None else f"{value:.{digits}f}"


def _interval(found: dict[str, float | None], *, signed: bool = False) -> str:
    if found["value"] is None:
        return "–"
    value, low, high = (f"{found[one]:{'+' if signed else ''}.4f}" for one in ("value", "low", "high"))
    return f"{value}\n({low} to {high})" if signed else f"{value}\n({low}–{high})"


def _value(found: dict[str, float | None]) -> str:
    return "–" if found["value"] is None else f"{found['value']:.4f}"
