"""`sella-train`: prepare, fit, evaluate, score, prompt, inspect, and the measurements of docs/results.md."""

import json
import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from models.backbone import BackboneError
from models.bundle import BundleError
from models.ids import IdError
from models.titles import TitleError
from models.tokens import TokenizerError
from training.config import Config, ConfigError, Until, load_config
from training.data.errors import DataError, disk_problem
from training.data.history import Histories, Ties
from training.data.prepare import app as prepare_app
from training.data.summary import summarize
from training.printing import (
    number,
    one_line,
    show_precision,
    show_report,
    show_stages,
    show_summary,
    show_ties,
    show_verdict,
)


class OneLineCommands(TyperGroup):
    """Tells a mistake on the command line in one line on stderr, with exit status 2."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command and exit; typer itself would print a usage and a box around the mistake."""
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
        except typer.Abort:
            sys.exit(130)
        except Exception as error:
            # The error of a wrong command line has no public name in every typer; no other has a formatted message.
            formatted = getattr(error, "format_message", None)
            if formatted is None:
                raise
            if message := " ".join(formatted().split()):  # without any argument typer has printed the help
                print(f"error: {message}", file=sys.stderr)
            sys.exit(2)
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=OneLineCommands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train and judge SeLLa-Rec bundles.",
    add_completion=False,
)
app.add_typer(prepare_app, name="prepare")

DataOption = Annotated[Path, typer.Option("--data", help="folder with items and interactions (docs/data.md)")]
BundleOption = Annotated[Path, typer.Option("--bundle", help="folder of the bundle")]
BackboneOption = Annotated[
    str, typer.Option("--backbone", help="smollm2-135m, tiny, a hub id, a folder, or a GGUF file")
]
ConfigOption = Annotated[
    str | None, typer.Option("--config", help="JSON file, or the name of one that comes with sella")
]
PositiveOption = Annotated[float | None, typer.Option(help="a rating above this is label 1")]
SplitByOption = Annotated[
    str | None, typer.Option("--split-by", help='one interactions file: "0.8,0.1,0.1" or "2017-12-01,2017-12-15"')
]
ColumnsOption = Annotated[
    str | None, typer.Option("--columns", help="the files' own names of columns: user_id=userId,item_id=movieId")
]
TiesOption = Annotated[
    Ties | None,
    typer.Option(help="strict, or file-order (as in CoLLM's files: also earlier rows of the same second)"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]
DeviceOption = Annotated[str, typer.Option(help="torch device")]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16 or fp8 instead of the bundle's own")]


@app.command()
def fit(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="folder of the bundle to write")],
    backbone: BackboneOption = "smollm2-135m",
    config: ConfigOption = None,
    resume: Annotated[bool, typer.Option(help="go on with a run that was stopped")] = False,
    until: Annotated[Until | None, typer.Option(help="end after this stage; --resume goes on from there")] = None,
    positive_above: PositiveOption = None,
    split_by: SplitByOption = None,
    columns: ColumnsOption = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="instead of the configuration's")] = None,
    ties: TiesOption = None,
    noun: Annotated[str | None, typer.Option(help="what an item is called in the prompt, such as book")] = None,
    plural: Annotated[str | None, typer.Option(help="its plural; by default the noun with an s")] = None,
) -> None:
    """Train all stages and write one bundle. The run's files are kept in OUT.run beside it."""
    with one_line_errors():
        from training.data.dataset import Dataset
        from training.pipeline import fit as fit_bundle
        from training.start import new_run, read_data
        from training.verdict import WITH_LIVE_COUNTS

        chosen = _configuration(config, ties)
        if seed is not None:
            chosen = chosen.model_copy(update={"seed": seed})
        chosen = chosen.calling_items(noun, plural)
        run = new_run(out.with_name(f"{out.name}.run"), chosen)

        def begun(dataset: Dataset, histories: Histories) -> None:
            show_summary(run.console, summarize(dataset, histories))
            show_ties(run.console, histories, list(dataset.splits))

        dataset = read_data(data, positive_above, split_by, columns=columns)
        report = fit_bundle(run, dataset, backbone, out, resume=resume, until=until, begun=begun)
        if run.is_main and not report:
            run.say(f"ended after {until}; to continue, run the same command with --resume and without --until")
        elif run.is_main:
            show_stages(run.console, report)
            show_report(run.console, "valid", report)
            show_verdict(run.console, "valid", report[WITH_LIVE_COUNTS])
            run.say(f"[bold]{out}[/bold] is ready: sella-serve run --bundle {out}")


@app.command()
def evaluate(
    bundle: BundleOption,
    data: DataOption,
    split: Annotated[str, typer.Option(help="train, valid or test")] = "test",
    live: Annotated[
        bool, typer.Option("--live", help="count all rows before each row, instead of the train split")
    ] = False,
    delay: Annotated[float, typer.Option(min=0, help="with --live: seconds until an outcome is known")] = 0.0,
    as_json: JsonOption = False,
    positive_above: PositiveOption = None,
    split_by: SplitByOption = None,
    columns: ColumnsOption = None,
    device: DeviceOption = "",
    dtype: DtypeOption = None,
    ties: TiesOption = None,
) -> None:
    """Measure a bundle's score and simple scorers on a split, with user-bootstrap intervals."""
    with one_line_errors():
        from training.counts import Counting, row_outcomes
        from training.data.history import build_histories
        from training.evaluate import score_split
        from training.overlap import doubts, tables_before_test
        from training.start import open_scorer, progress_bar, read_data
        from training.verdict import judge_bundle

        if not math.isfinite(delay):
            raise ConfigError(f"--delay {delay}: give seconds")
        if delay and not live:
            raise ConfigError(f"--delay {delay:g}: it applies to live counts only; add --live")
        counting = Counting(live=live, delay=delay)
        opened, scorer = open_scorer(bundle, device, dtype)
        dataset = read_data(data, positive_above, split_by, (split,), columns)
        histories = build_histories(dataset, ties or opened.manifest.training.get("ties", "strict"))
        show_ties(Console(stderr=True), histories, [split])
        if delay:
            times_B = dataset.splits[split]["timestamp"].to_numpy()
            histories = histories.delayed(split, times_B - delay)
        for doubt in doubts(bundle, opened.manifest, scorer.tables, dataset, split):
            print(f"warning: {doubt}", file=sys.stderr)
        scorer = replace(scorer, tables=tables_before_test(scorer.tables, dataset, opened.manifest))
        outcomes = row_outcomes(dataset, split, counting, scorer.tables)
        with progress_bar(f"scoring {split}") as progress:
            scored = score_split(scorer, dataset, histories, split, progress=progress, outcomes=outcomes)
        report = judge_bundle(opened.fusion(), scored, dataset, histories, split, scorer.tables, counting)
        if as_json:
            print(json.dumps(report))
        else:
            show_report(Console(width=100), split, report)


@app.command()
def precision(
    bundle: BundleOption,
    data: DataOption,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or fp8, to be compared with the bundle's own")],
    split: Annotated[str, typer.Option(help="train, valid or test")] = "valid",
    as_json: JsonOption = False,
    positive_above: PositiveOption = None,
    split_by: SplitByOption = None,
    columns: ColumnsOption = None,
    device: DeviceOption = "",
    ties: TiesOption = None,
) -> None:
    """Tell what another number type changes: AUC, UAUC and log-loss, with user-bootstrap intervals; the worst score."""
    with one_line_errors():
        from models.bundle import verify
        from training.data.history import build_histories
        from training.precision import precision_study
        from training.start import progress_bar, read_data

        dataset = read_data(data, positive_above, split_by, (split,), columns)
        histories = build_histories(dataset, ties or verify(bundle).training.get("ties", "strict"))
        show_ties(Console(stderr=True), histories, [split])
        with progress_bar(f"scoring {split} twice") as progress:
            report = precision_study(bundle, dataset, histories, split, device, dtype, progress)
        if as_json:
            print(json.dumps(report))
        else:
            show_precision(Console(width=100), report)


@app.command()
def score(
    bundle: BundleOption,
    pairs: Annotated[Path, typer.Option(help="parquet or CSV with user_id, item_id and, for unknown items, title")],
    out: Annotated[Path, typer.Option(help=".parquet or .csv to write")],
    on_unknown: Annotated[
        Literal["error", "skip"], typer.Option(help="error, or skip: such pairs get no score")
    ] = "error",
    chunk: Annotated[int, typer.Option(min=1, help="pairs of one resumable part")] = 20_000,
    columns: ColumnsOption = None,
    device: DeviceOption = "",
    dtype: DtypeOption = None,
) -> None:
    """Score unlabelled pairs with the bundle's stored histories; a run that was stopped resumes by itself."""
    with one_line_errors():
        from training.batch import score_pairs
        from training.data.tables import parse_columns
        from training.start import open_scorer, progress_bar

        opened, scorer = open_scorer(bundle, device, dtype)
        with progress_bar(f"scoring {pairs.name}") as progress:
            cleaned = score_pairs(
                opened,
                scorer,
                pairs,
                out,
                skip_unknown=on_unknown == "skip",
                chunk=chunk,
                columns=parse_columns(columns),
                progress=progress,
            )
        if cleaned:
            print(f"{cleaned:,} pairs have a title that was cleaned (docs/data.md)", file=sys.stderr)


@app.command()
def prompt(
    bundle: BundleOption,
    user: Annotated[str, typer.Option(help="user id")],
    item: Annotated[str, typer.Option(help="item id")],
    history: Annotated[str | None, typer.Option(help="liked item ids, oldest first, by comma; else the stored")] = None,
    title: Annotated[str | None, typer.Option(help="title of an item outside the catalogue")] = None,
    as_json: JsonOption = False,
    vectors: Annotated[bool, typer.Option(help="with --json: the projected vector of every slot")] = False,
) -> None:
    """Print one pair's prompt: token ids, text and slots, as training and serving assemble it."""
    with one_line_errors():
        from training.inspection import describe_prompt, prompt_text
        from training.start import open_scorer

        opened, scorer = open_scorer(bundle, "", None)
        liked = None if history is None else [one for one in history.split(",") if one]
        described = describe_prompt(opened, scorer, user, item, liked, title, with_vectors=vectors)
        print(json.dumps(described) if as_json else prompt_text(described))


@app.command()
def inspect(bundle: Annotated[Path, typer.Argument(help="folder of the bundle")], as_json: JsonOption = False) -> None:
    """Verify a bundle and print what it holds."""
    with one_line_errors():
        from models.bundle import verify
        from training.inspection import bundle_text

        manifest = verify(bundle)
        print(manifest.canonical().decode() if as_json else bundle_text(manifest))


@app.command()
def backbone(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="smollm2-135m, or a GGUF file")],
    out: Annotated[Path | None, typer.Option(help="folder to write, instead of the cache")] = None,
) -> None:
    """Download a known language model or convert a GGUF file, once, and print its folder."""
    with one_line_errors():
        from transformers.utils import logging as transformers_logging

        from training.conversion import converted

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        print(converted(name, out))


@app.command()
def configuration() -> None:
    """Print every configuration key as the Markdown of docs/configuration.md."""
    from training.reference import configuration_reference

    print(configuration_reference(), end="")


@app.command()
def alignment(
    data: DataOption,
    work: Annotated[Path, typer.Option(help="folder for what is trained on the way; resumes from it")],
    backbone: BackboneOption = "tiny",
    config: ConfigOption = None,
    seeds: Annotated[int, typer.Option(min=2, help="how often stage 2 is trained")] = 5,
    positive_above: PositiveOption = None,
    split_by: SplitByOption = None,
    columns: ColumnsOption = None,
    ties: TiesOption = None,
) -> None:
    """Table 6 of the paper: AUC before stage 3's first step, with and without alignment, over several seeds."""
    with one_line_errors():
        from training.data.history import build_histories
        from training.metrics import mean_interval
        from training.start import new_run, read_data
        from training.studies import alignment_study

        run = new_run(work, _configuration(config, ties))
        work.mkdir(parents=True, exist_ok=True)
        dataset = read_data(data, positive_above, split_by, columns=columns)
        show_ties(run.console, build_histories(dataset, run.config.ties), ["train", "valid"])
        reached = alignment_study(run, dataset, backbone, seeds)
        table = Table("warm valid rows, step 0", "mean AUC (95 %)", *(f"seed {seed}" for seed in range(seeds)))
        for name, areas in reached.items():
            table.add_row(name, one_line(mean_interval(areas).as_dict()), *(f"{area:.4f}" for area in areas))
        run.console.print(table)


@app.command()
def windows(
    data: DataOption,
    work: Annotated[Path, typer.Option(help="folder for both trainings; resumes from it")],
    backbone: BackboneOption = "tiny",
    config: ConfigOption = None,
    positive_above: PositiveOption = None,
    split_by: SplitByOption = None,
    columns: ColumnsOption = None,
    ties: TiesOption = None,
) -> None:
    """Train with sliding and with anchored history windows: tokens computed per target and AUC, side by side."""
    with one_line_errors():
        from training.data.history import build_histories
        from training.start import new_run, read_data
        from training.studies import window_study

        run = new_run(work, _configuration(config, ties))
        dataset = read_data(data, positive_above, split_by, columns=columns)
        show_ties(run.console, build_histories(dataset, run.config.ties), ["train", "valid"])
        results, difference = window_study(run, dataset, backbone, work)
        table = Table(
            "window", "tokens a target, stage 1", "stage 3", "one prompt a target", "stage 1 AUC", "stage 3 AUC"
        )
        for result in results:
            (packed_1, _), (packed_3, alone_3) = result.tokens["adapt"], result.tokens["project"]
            areas = (result.stages["stage 1, text alone"]["auc"], result.stages["stage 3"]["auc"])
            cells = [f"{value:.1f}" for value in (packed_1, packed_3, alone_3)]
            table.add_row(result.window, *cells, *map(number, areas))
        run.console.print(table)
        run.console.print(f"stage 3, anchored minus sliding: AUC {one_line(difference['auc'])}")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into one line on stderr and exit status 2; anything else is a bug and shows as one."""
    from polars.exceptions import PolarsError
    from safetensors import SafetensorError

    from models.scoring_model import NotFiniteError
    from training.loop import TrainingError
    from training.run import RunError

    known = (
        *(DataError, ConfigError, BundleError, BackboneError),
        *(TokenizerError, IdError, TitleError, RunError, TrainingError, NotFiniteError),
    )
    # TensorBoard writes in a thread, whose error comes up in the command too.
    threading.excepthook = lambda told: None if isinstance(told.exc_value, OSError) else threading.__excepthook__(told)
    try:
        yield
    except known as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except (OSError, SafetensorError, PolarsError) as error:  # a folder that cannot be written, a disk that is full
        if (problem := disk_problem(error)) is None:
            raise
        print(f"error: {problem}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was (fit: with --resume)", file=sys.stderr)
        raise typer.Exit(130) from None


def _configuration(config: str | None, ties: Ties | None) -> Config:
    """Return the configuration, with the command line's rule for ties if there is one."""
    chosen = load_config(config)
    return chosen if ties is None else chosen.model_copy(update={"ties": ties})


if __name__ == "__main__":
    app()
