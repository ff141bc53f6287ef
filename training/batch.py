"""Scoring a file of unlabelled pairs, in parts, so that any size fits in memory and a stopped run resumes.

Each pair is scored under its user's stored history, for a moment long after the bundle's last row, as in a service with
an empty log: the drift of the user's bias is over, and no like is recent.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from models.assembly import AssembledUser, known_pairs
from models.features import ItemFeatures
from models.fusion import Counts, probabilities
from models.ids import IdError, canonical_id
from models.loading import Bundle
from models.packs import ScoringGroup
from training.data.columns import FLOAT_ID, cleaned_title, reject_float_ids
from training.data.errors import DataError
from training.data.tables import CSV_ROWS_AT_ONCE, NO_COLUMNS, SUFFIXES, csv_parts, missing_column, own_names
from training.evaluate import SCORING_TOKENS, Scorer
from training.progress import Progress, no_progress
from training.run import code_version, write_json

GROUPS_AT_ONCE = 64
FORMATS = (".parquet", ".csv")
PAIR = ("user_id", "item_id")


@dataclass(frozen=True)
class PairFile:
    """A file of pairs, read a part at a time by the rules of a data folder's tables; ids in a CSV are text."""

    path: Path
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path.name.endswith(SUFFIXES):
            raise DataError(f"{self.path}: give a file that ends in {', '.join(SUFFIXES)}")
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file")

    def rows(self) -> int:
        """Return how many pairs there are.

        Raises:
            DataError: the file cannot be read, lacks a column, or every id of a column is a float as text.
        """
        rows = 0
        floats = dict.fromkeys(PAIR, True)
        for _, part in self.parts(CSV_ROWS_AT_ONCE):
            for name in PAIR:
                if name not in part.columns:
                    raise missing_column(self.path, name, self.columns)
                if part.schema[name] == pl.String and part.height:
                    floats[name] = floats[name] and bool(part[name].str.contains(FLOAT_ID).all())
                    if rows == 0:
                        first = part.row(0, named=True)
                else:
                    floats[name] = False
            rows += part.height
        for name in PAIR if rows else ():
            reject_float_ids(self.path.name, name, floats[name], str(first[name]) if floats[name] else "")
        return rows

    def parts(self, size: int) -> Iterator[tuple[int, pl.DataFrame]]:
        """Yield (first row, pairs) with columns user_id, item_id and, where the file has it, title."""
        wanted = (*PAIR, "title")
        if self.path.suffix != ".parquet":
            yield from csv_parts(self.path, wanted, self.columns, require=PAIR, rows_at_once=size)
            return
        first = 0
        with self._readable():
            scan = pl.scan_parquet(self.path)
            named = own_names(scan.collect_schema().names(), wanted, self.columns)
            chosen = scan.select(pl.col(own).alias(name) for name, own in named.items())
            for frame in chosen.collect_batches(chunk_size=size, maintain_order=True):
                for start in range(0, frame.height, size):
                    part = frame.slice(start, size)
                    yield first, part
                    first += part.height

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Polars reads lazily: a broken file may show at any of its calls."""
        try:
            yield
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{self.path.name}: cannot be read: {error}") from error


def score_pairs(
    bundle: Bundle,
    scorer: Scorer,
    pairs: Path,
    out: Path,
    *,
    skip_unknown: bool,
    chunk: int,
    columns: Mapping[str, str] = NO_COLUMNS,
    progress: Progress = no_progress,
) -> int:
    """Score every pair of a file into `out`: user_id, item_id, score, raw_score, cold_user, cold_item.

    Returns how many pairs of items outside the catalogue have a title that `models.titles.clean_title` changed.

    Parts are kept in `out`.parts until all are there; a run with the same bundle, pairs and options takes up those
    that are finished.

    Raises:
        DataError: unreadable pairs, a bad id, or an unknown item without a title unless `skip_unknown`.
    """
    source = PairFile(pairs, columns)
    if out.suffix not in FORMATS:
        raise DataError(f"{out}: give a file that ends in {' or '.join(FORMATS)}")
    if out.exists():
        raise DataError(f"{out} already exists; choose another path or remove it")
    total = source.rows()
    if total == 0:
        raise DataError(f"{pairs.name}: holds no pairs")
    folder = out.with_name(f"{out.name}.parts")
    backbone = scorer.model.backbone
    identity: dict[str, object] = {
        "bundle": bundle.id,
        "pairs": str(pairs.resolve()),
        "modified": pairs.stat().st_mtime_ns,
        "chunk": chunk,
        "skip": skip_unknown,
        "columns": dict(columns),
        "code": code_version(),
        "dtype": str(backbone.dtype),
        "device": backbone.model.device.type,
    }
    _claim(folder, identity)
    cleaned = 0
    for index, (first, part) in enumerate(source.parts(chunk)):
        path = folder / f"{index:08d}.parquet"
        if not path.exists():
            scratch = path.with_suffix(".scratch")
            # A part's bytes must not depend on the parts before it, which a resumed run does not compute.
            scorer.model.forget()
            _score_part(bundle, scorer, part, first, pairs.name, skip_unknown).write_parquet(scratch)
            scratch.rename(path)
        cleaned += _titles_cleaned(scorer, part)
        progress(first + part.height, total)
    scored = pl.scan_parquet(sorted(folder.glob("*.parquet")))
    scratch = out.with_name(f".{out.name}.scratch")
    if out.suffix == ".csv":
        scored.sink_csv(scratch)
    else:
        scored.sink_parquet(scratch)
    scratch.rename(out)
    shutil.rmtree(folder)
    return cleaned


def _titles_cleaned(scorer: Scorer, part: pl.DataFrame) -> int:
    if "title" not in part.columns:
        return 0
    rows = zip(part["item_id"].to_list(), part["title"].to_list(), strict=True)
    return sum(
        cleaned_title(title) not in (None, title) and not scorer.tables.has_item(str(item_id))
        for item_id, title in rows
    )


def _claim(folder: Path, identity: dict[str, object]) -> None:
    path = folder / "run.json"
    if path.exists() and json.loads(path.read_text()) != identity:
        shutil.rmtree(folder)  # parts of other pairs or another bundle
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, identity)


def _score_part(
    bundle: Bundle, scorer: Scorer, part: pl.DataFrame, first: int, file: str, skip_unknown: bool
) -> pl.DataFrame:
    """Score one part; each user's pairs share a prompt."""
    users = _ids(part, "user_id", first, file)
    items = _ids(part, "item_id", first, file)
    known = _items(scorer, part, items, first, file, skip_unknown)
    rows_by_user: dict[str, list[int]] = {}
    for row, (user_id, item_id) in enumerate(zip(users, items, strict=True)):
        if item_id in known:
            rows_by_user.setdefault(user_id, []).append(row)
    fusion = bundle.fusion()
    raw, scored = np.full((2, part.height), np.nan)
    cold_user = [False] * part.height
    waiting = list(rows_by_user.items())
    for start in range(0, len(waiting), GROUPS_AT_ONCE):
        groups: list[ScoringGroup] = []
        users_known: list[tuple[Counts, AssembledUser]] = []
        for user_id, rows in waiting[start : start + GROUPS_AT_ONCE]:
            assembled = scorer.stored_user(user_id)
            for row in rows:
                cold_user[row] = assembled.cold
            groups.append(scorer.assembler.group(assembled, [known[items[row]] for row in rows]))
            users_known.append((scorer.user_counts(user_id), assembled))
        for (_, rows), group, user, logits in zip(
            waiting[start : start + GROUPS_AT_ONCE],
            groups,
            users_known,
            scorer.model.logits(groups, SCORING_TOKENS),
            strict=True,
        ):
            raw[rows] = probabilities(logits)
            candidates = [known[items[row]] for row in rows]
            told = [(item.counts, not item.trained) for item in candidates]
            scored[rows] = fusion(known_pairs(logits, group, user, told, live=True))
    return pl.DataFrame(
        {
            "user_id": users,
            "item_id": items,
            "score": pl.Series(scored, dtype=pl.Float64).fill_nan(None),
            "raw_score": pl.Series(raw, dtype=pl.Float64).fill_nan(None),
            "cold_user": cold_user,
            "cold_item": [not known[item].trained if item in known else True for item in items],
        }
    )


def _ids(part: pl.DataFrame, column: str, first: int, file: str) -> list[str]:
    ids = []
    for row, value in enumerate(part[column].to_list(), first + 1):
        try:
            ids.append(canonical_id(value))
        except IdError as error:
            raise DataError(f"{file}: column '{column}', row {row}: {error}") from error
    return ids


def _items(
    scorer: Scorer, part: pl.DataFrame, items: list[str], first: int, file: str, skip_unknown: bool
) -> dict[str, ItemFeatures]:
    """Return the features of every item that can be scored."""
    titles = part["title"].to_list() if "title" in part.columns else [None] * part.height
    wanted: dict[str, str] = {}
    for row, (item_id, title) in enumerate(zip(items, titles, strict=True)):
        if scorer.tables.item(item_id) is not None:
            wanted[item_id] = ""
        elif (clean := cleaned_title(title)) is not None:
            if wanted.setdefault(item_id, clean) != clean:
                raise DataError(
                    f"{file}: column 'title', row {first + row + 1}: {item_id!r} is {clean!r} here and"
                    f" {wanted[item_id]!r} above; give an unknown item one title"
                )
        elif not skip_unknown:
            raise DataError(
                f"{file}: column 'item_id', row {first + row + 1}: {item_id!r} is not in the bundle's catalogue; add a"
                " 'title' column, or leave such pairs without a score by --on-unknown skip"
            )
    return scorer.items(wanted)
