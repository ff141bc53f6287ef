"""`sella-train prepare`: raw or made-up data to a data folder, with a report of what was kept and dropped."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

import numpy as np
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.metrics import roc_auc_score

from training.data.amazon import Halves, prepare_amazon
from training.data.errors import DataError, first_problem
from training.data.films import FilmsConfig, draw_film_tables, on_new_films, planted_film_probability, popularity
from training.data.folder import write_folder
from training.data.movielens import prepare_movielens
from training.data.raw import OpenRaw
from training.data.report import Report, describe
from training.data.split import SplitRule
from training.data.synthetic import SyntheticConfig, draw_tables, planted_probability

app = typer.Typer(name="prepare", help="Turn raw or made-up data into a data folder.", no_args_is_help=True)

Out = Annotated[Path, typer.Option("--out", help="Data folder to write.", file_okay=False)]
DEMO = SyntheticConfig()
FILMS = FilmsConfig()


@app.command()
def movielens(
    raw: Annotated[Path, typer.Argument(help="Folder of a release: 100K, 1M, 10M, 20M, 25M, 32M or latest.")],
    out: Out,
    positive_above: Annotated[float | None, typer.Option(help="Positive are ratings above this; 3.5.")] = None,
    split_by: Annotated[str | None, typer.Option(help='"0.8,0.1,0.1" (the default) or dates.')] = None,
) -> None:
    """Any MovieLens release, cut by time; 1M, without these options, in the split of the paper.

    That split is the months 14-23, 24-28 and 29-33 of the data set, positive from 4 stars.
    """
    with _problems_in_one_line(), _watched() as open_file:
        rule = None if split_by is None else SplitRule.parse(split_by)
        report = prepare_movielens(raw, out, positive_above=positive_above, split=rule, open_file=open_file)
    _print_report(report, out)


@app.command()
def amazon(
    reviews: Annotated[Path, typer.Option(help="Reviews, JSON lines, gzip or plain (Books_5.json.gz).")],
    metadata: Annotated[Path, typer.Option(help="Metadata, JSON lines, gzip or plain (meta_Books.json.gz).")],
    out: Out,
    year: Annotated[int, typer.Option(help="The year to keep.", min=1996, max=9998)] = 2017,
    min_interactions: Annotated[int, typer.Option(help="Keep users with more than this many.", min=0)] = 20,
    min_item_interactions: Annotated[int, typer.Option(help="Keep items with more than this many.", min=0)] = 0,
    threshold: Annotated[float, typer.Option(help="Positive are ratings above this.")] = 4.0,
    halves: Annotated[Halves, typer.Option(help="Cut December at its 16th day, or by rows.")] = "month",
) -> None:
    """Amazon reviews of one year: January to November, and the halves of December."""
    with _problems_in_one_line(), _watched() as open_file:
        report = prepare_amazon(
            reviews,
            metadata,
            out,
            year=year,
            min_interactions=min_interactions,
            min_item_interactions=min_item_interactions,
            threshold=threshold,
            halves=halves,
            open_file=open_file,
        )
    _print_report(report, out)


@app.command()
def synthetic(
    out: Out,
    users: Annotated[int, typer.Option(help="Users, cold ones included.")] = DEMO.users,
    items: Annotated[int, typer.Option(help="Items, cold ones included.")] = DEMO.items,
    train_rows: Annotated[int, typer.Option(help="Rows of train.")] = DEMO.train_rows,
    valid_rows: Annotated[int, typer.Option(help="Rows of valid.")] = DEMO.valid_rows,
    test_rows: Annotated[int, typer.Option(help="Rows of test.")] = DEMO.test_rows,
    seed: Annotated[int, typer.Option(help="Another seed, another catalogue.")] = DEMO.seed,
) -> None:
    """A made-up catalogue with planted tastes, popularity, cold users and cold items."""
    with _problems_in_one_line():
        config = _checked(
            SyntheticConfig,
            "synthetic",
            users=users,
            items=items,
            train_rows=train_rows,
            valid_rows=valid_rows,
            test_rows=test_rows,
            seed=seed,
        )
        tables = draw_tables(config)
        write_folder(out, tables)
    _print_report(describe(tables), out)
    for split in ("valid", "test"):
        rows = tables[split]
        if rows["label"].n_unique() < 2:
            continue
        best = roc_auc_score(rows["label"].to_numpy(), planted_probability(config, rows))
        typer.echo(f"AUC of the planted probabilities on {split}, the best to expect: {best:.4f}")


@app.command()
def films(
    out: Out,
    users: Annotated[int, typer.Option(help="Users, new ones included.")] = FILMS.users,
    train_rows: Annotated[int, typer.Option(help="Rows of train.")] = FILMS.train_rows,
    valid_rows: Annotated[int, typer.Option(help="Rows of valid.")] = FILMS.valid_rows,
    test_rows: Annotated[int, typer.Option(help="Rows of test.")] = FILMS.test_rows,
    seed: Annotated[int, typer.Option(help="Another seed gives other users and other new films.")] = FILMS.seed,
) -> None:
    """Real film titles, generated users with planted tastes for genres, new films and new users: the demo's data."""
    with _problems_in_one_line():
        config = _checked(
            FilmsConfig,
            "films",
            users=users,
            train_rows=train_rows,
            valid_rows=valid_rows,
            test_rows=test_rows,
            seed=seed,
        )
        tables = draw_film_tables(config)
        write_folder(out, tables)
    _print_report(describe(tables), out)
    for split in ("valid", "test"):
        rows = tables[split]
        labels, best, new = rows["label"].to_numpy(), planted_film_probability(config, rows), on_new_films(config, rows)
        typer.echo(
            f"AUC on {split}: planted probabilities {_auc(labels, best)}, the best to expect; on the {new.sum():,} rows"
            f" of new films {_auc(labels[new], best[new])}; popularity alone"
            f" {_auc(labels, popularity(tables['train'], rows))}"
        )


Sizes = TypeVar("Sizes", bound=SyntheticConfig)


def _checked(kind: type[Sizes], command: str, **sizes: Any) -> Sizes:
    """Return a configuration; an error names its first problem in one line."""
    try:
        return kind(**sizes)
    except ValidationError as error:
        raise DataError(f"{command}: {first_problem(error)}") from None


def _auc(labels: np.ndarray, scores: np.ndarray) -> str:
    """Return an AUC as text; a dash if all labels are equal."""
    return f"{roc_auc_score(labels, scores):.4f}" if len(np.unique(labels)) == 2 else "–"


@contextmanager
def _problems_in_one_line() -> Iterator[None]:
    """Print a problem in the data as one line and leave with exit code 2."""
    try:
        yield
    except DataError as error:
        # Not through rich, which would wrap the line and read brackets in a title as markup.
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def _watched() -> Iterator[OpenRaw]:
    """Yield an opener of raw files that shows how far each has been read."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    # Where there is no terminal, rich would print an empty line for the bar, beside the one line of an error.
    with Progress(*columns, console=console, disable=not console.is_interactive) as progress:

        def open_file(path: Path) -> IO[bytes]:
            return progress.open(path, "rb", description=path.name)

        yield open_file


def _print_report(report: Report, out: Path) -> None:
    table = Table("split", title=f"{out}: {report.items:,} items in the catalogue", title_justify="left")
    for name in ("rows", "users", "items", "positive"):
        table.add_column(name, justify="right")
    for name, size in report.splits.items():
        share = f"{size.positives / size.rows:.1%}" if size.rows else "no file"
        table.add_row(name, f"{size.rows:,}", f"{size.users:,}", f"{size.items:,}", share)
    console = Console()
    console.print(table)
    for reason, rows in report.dropped.items():
        console.print(f"dropped {rows:,} rows: {reason}")
    for note in report.notes:
        console.print(note)
