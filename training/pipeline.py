"""`fit`: data in, one bundle out, through every stage; killed at any point, it resumes.

The stages meet through files in the run folder, so that each reads what the one before it left.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.assembly import Assembler
from models.backbone import DTYPES, Backbone, load_merged
from models.bundle import (
    BackboneEntry,
    BundleError,
    Dimensions,
    FileEntry,
    Manifest,
    copy_tree,
    merged_id,
    verify,
    write_bundle,
)
from models.features import MAX_OUTCOMES, Outcome, Tables
from models.loading import BACKBONE
from models.projection import Projections
from models.scoring_model import ScoringModel
from models.template import Template
from training.backbones import Base, made_by_the_run, opened_before_the_run
from training.config import TINY, Until
from training.counts import LIVE, counts_by_id, row_outcomes
from training.data.dataset import Dataset, fingerprint_of, require_learnable
from training.data.history import Histories, build_histories
from training.evaluate import Scorer, cold_rows, score_split
from training.examples import Examples
from training.fusion import enough_to_fit
from training.overlap import ROWS_FILE, write_rows
from training.report import stage_report
from training.run import Run, code_version, read_tensors, write_tensors
from training.stages.adapt import adapt, distil_items
from training.stages.align import Collab, align
from training.stages.pretrain import pretrain
from training.stages.project import initial_projections, project
from training.verdict import FittedFusion, fit_and_judge


@dataclass(frozen=True)
class Prepared:
    """What stands before stage 2: the adapted language model and the data as examples."""

    base: Base
    adapter: Path
    dtype: Literal["float32", "bfloat16"]
    backbone: Backbone
    examples: Examples
    semantic_ID: Tensor


def fit(
    run: Run,
    dataset: Dataset,
    backbone: str,
    out: Path,
    *,
    resume: bool,
    until: Until | None = None,
    begun: Callable[[Dataset, Histories], None] = lambda dataset, histories: None,
) -> dict[str, Any]:
    """Train every stage and write the bundle; returns its validation report. A finished run resumes to its report.

    Train and valid alone train and judge. The bundle's histories, counts and outcomes hold every row, also of test.

    The main process calls `begun` with the data and histories, after the run folder is claimed. With `until` the run
    ends after that stage, writes no bundle and returns an empty report; a resumed run continues after that stage.

    Raises:
        BundleError: something else is already at `out`.
        DataError: no stage can learn from the data.
        BackboneError, TokenizerError: the backbone cannot be used; the run folder is then not claimed.
        RunError: the run folder holds another run.
    """
    if out.exists() and not (resume and run.claimed):
        raise BundleError(f"{out} already exists; choose another path or remove it")
    whole = dataset
    dataset = replace(dataset, splits={name: dataset.splits[name] for name in ("train", "valid")})
    require_learnable(dataset)
    identity = run_identity(run, whole, backbone)
    run.check(identity, resume=resume, finished=out.exists())
    if out.exists():
        _say_what_items_are_called(run)
        return dict(verify(out).metrics)
    base = None if backbone == TINY else opened_before_the_run(run, backbone)
    run.claim(identity, resume=resume)
    _say_what_items_are_called(run)
    _say_if_valid_is_small(run, dataset)
    histories = build_histories(dataset, run.config.ties)
    if run.is_main:
        begun(dataset, histories)
    prepared = prepare(run, dataset, histories, base)
    if until == "adapt":
        return {}
    collab = align(run, prepared.examples, prepared.semantic_ID)
    if until == "align":
        return {}
    tables, projections, report = _projected(run, prepared, collab)
    if run.is_main:
        scorer = _scorer(run, prepared, histories, collab, tables, projections)
        with run.progress("scoring valid", dataset.splits["valid"].height, unit="row") as progress:
            outcomes = row_outcomes(dataset, "valid", LIVE, scorer.tables)
            scored = score_split(scorer, dataset, histories, "valid", progress=progress.count, outcomes=outcomes)
        fitted = fit_and_judge(scored, dataset, histories, scorer.tables, run.config.seed)
        report |= fitted.report
        latest = _with_all_rows(run, scorer, whole, collab)
        _write(run, out, prepared, scorer, latest, projections, fitted, whole, report)
    run.accelerator.wait_for_everyone()
    return report


def prepare(run: Run, dataset: Dataset, histories: Histories, base: Base | None) -> Prepared:
    """Take the opened backbone, or make `tiny`; train its adapter, merge the two, and embed every item.

    Raises:
        RunError: the run that is resumed began with another backbone.
    """
    base = base or made_by_the_run(run, pretrain(run, dataset, histories))
    run.pin("backbone", {"id": base.id})
    source = base.source.folder
    examples = Examples(dataset, histories, Template(run.config.template, base.encoder))
    dtype = run.config.number_type(TINY if base.source.name == BACKBONE else base.source.name)
    adapter = adapt(run, examples, source, DTYPES[dtype])
    merged = load_merged(source, adapter, dtype=DTYPES[dtype], device=str(run.device))
    return Prepared(base, adapter, dtype, merged, examples, distil_items(run, examples, merged))


def _say_what_items_are_called(run: Run) -> None:
    template = run.config.template
    if "noun" not in template.model_fields_set:
        run.say(
            f'items are called "{template.noun}" in the prompt, since neither --noun nor template.noun names them; for'
            " other items give for example --noun book"
        )


def _say_if_valid_is_small(run: Run, dataset: Dataset) -> None:
    labels_B = dataset.splits["valid"]["label"].to_numpy()
    if not enough_to_fit(labels_B > 0):
        run.say(
            f"{dataset.file_of('valid')}: {len(labels_B):,} rows, {int(labels_B.sum()):,} of label 1, are too few to"
            " fit the weights of score, which keep their defaults"
        )


def _projected(run: Run, prepared: Prepared, collab: Collab) -> tuple[dict[str, Tensor], Projections, dict[str, Any]]:
    """Run stage 3, or take what it left."""
    path = run.folder / "project_result.safetensors"
    projections = initial_projections(run, prepared.backbone, collab)
    if not path.exists():
        result = project(run, prepared.examples, prepared.backbone, collab, projections)
        report = stage_report(run, prepared.examples, collab, result)
        named = {f"projections.{name}": one for name, one in result.projections.state_dict().items()}
        if run.is_main:
            write_tensors(run.folder / "project_valid.safetensors", {"logits": torch.from_numpy(result.valid_logits_B)})
            write_tensors(path, result.tables | named, report)
        run.accelerator.wait_for_everyone()
    tensors, report = read_tensors(path)
    prefix = "projections."
    projections.load_state_dict(
        {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
    )
    return {name: one for name, one in tensors.items() if not name.startswith(prefix)}, projections, report


def _scorer(
    run: Run,
    prepared: Prepared,
    histories: Histories,
    collab: Collab,
    tables: dict[str, Tensor],
    projections: Projections,
) -> Scorer:
    """Put the trained parts together; histories, counts and outcomes are those of train and valid."""
    items = prepared.examples.dataset.items
    served = Tables(
        item_ids=items["item_id"].to_list(),
        titles=items["title"].to_list(),
        item_trained_I=collab.item_trained_I.numpy(),
        user_trained_U=collab.user_trained_U.numpy(),
        user_vectors_UC=tables["user_vectors"].numpy(),
        item_vectors_IC=tables["item_vectors"].numpy(),
        fold_vectors_IC=collab.item_vectors_IC.numpy(),
        semantic_ID=tables["semantic"].numpy(),
        prior=collab.prior,
        text_map=collab.text_map,
        **_of_rows(prepared.examples.dataset, histories, run.config.template.max_history),
    )
    assembler = Assembler(prepared.examples.template, collab.prior)
    return Scorer(ScoringModel(prepared.backbone, projections), served, assembler)


def _of_rows(dataset: Dataset, histories: Histories, size: int) -> dict[str, Any]:
    """Return what the tables hold of a dataset's rows: users, histories, outcomes and counts.

    Users of test alone come last, because splits come in order.
    """
    codes, item_ids = range(len(histories.user_ids)), dataset.items["item_id"].to_list()
    liked = [histories.positives_of(code) for code in codes]
    times = [histories.times_of(code) for code in codes]
    splits = dataset.splits
    return {
        "user_ids": histories.user_ids.to_list(),
        "histories": [tuple(item_ids[row] for row in rows[max(0, len(rows) - size) :]) for rows in liked],
        "history_times": [tuple(rows[max(0, len(rows) - size) :].tolist()) for rows in times],
        "history_totals": [len(rows) for rows in liked],
        "outcomes": _outcomes([frame for name, frame in splits.items() if name != "train"], histories.user_ids),
        "train_impressions_U": _counts([splits["train"]], "user_id", histories.user_ids)[:, 0],
        "user_since_U": _first_rows(splits.values(), histories.user_ids),
        "user_counts_U2": _counts(splits.values(), "user_id", histories.user_ids),
        "item_counts_I2": _counts(splits.values(), "item_id", dataset.items["item_id"]),
    }


def _with_all_rows(run: Run, scorer: Scorer, whole: Dataset, collab: Collab) -> Tables:
    """Return the tables with the histories, counts and outcomes of all rows: what was held back judged, and serves."""
    histories = build_histories(whole, run.config.ties)
    new = len(histories.user_ids) - len(scorer.tables.user_ids)
    rows = sum(frame.height for frame in whole.splits.values())
    run.say(
        f"histories and counts of the bundle hold all {rows:,} rows of {', '.join(whole.splits)}, up to"
        f" {datetime.fromtimestamp(_latest(whole.splits.values()), UTC).isoformat(' ', 'seconds')} UTC"
    )
    vectors_UC = scorer.tables.user_vectors_UC
    return replace(
        scorer.tables,
        user_trained_U=np.concatenate([scorer.tables.user_trained_U, np.zeros(new, bool)]),
        user_vectors_UC=np.concatenate([vectors_UC, np.tile(collab.prior.mean_C, (new, 1))]),
        **_of_rows(whole, histories, run.config.template.max_history),
    )


def _latest(frames: Iterable[pl.DataFrame]) -> float:
    times = pl.concat(frame.select(pl.col("timestamp").cast(pl.Float64)) for frame in frames)
    return float(times["timestamp"].to_numpy().max())


def _counts(frames: Iterable[pl.DataFrame], column: str, ids: pl.Series) -> np.ndarray:
    """Return impressions and positives of each user or item over all rows of some splits, `(ids, 2)` int64."""
    counted = counts_by_id(pl.concat(frame.select(column, "label") for frame in frames), column)
    joined = ids.alias(column).to_frame().join(counted, on=column, how="left", maintain_order="left")
    return joined.select("impressions", "positives").fill_null(0).to_numpy()


def _first_rows(frames: Iterable[pl.DataFrame], user_ids: pl.Series) -> np.ndarray:
    """Return when the first row of each user was over all rows that the bundle learns from, `(U,)` UTC seconds."""
    rows = pl.concat(frame.select("user_id", pl.col("timestamp").cast(pl.Float64)) for frame in frames)
    first = rows.group_by("user_id").agg(pl.col("timestamp").min())
    joined = user_ids.alias("user_id").to_frame().join(first, on="user_id", how="left", maintain_order="left")
    return joined["timestamp"].to_numpy()


def _outcomes(frames: Iterable[pl.DataFrame], user_ids: pl.Series) -> list[tuple[Outcome, ...]]:
    """Return each user's newest `MAX_OUTCOMES` outcomes in some splits, oldest first."""
    newest = (
        pl.concat(frames)
        .sort("timestamp", maintain_order=True)
        .group_by("user_id", maintain_order=True)
        .tail(MAX_OUTCOMES)
        .group_by("user_id", maintain_order=True)
        .agg("item_id", pl.col("label") > 0, pl.col("timestamp").cast(pl.Float64))
    )
    found = {user_id: tuple(map(Outcome, *told)) for user_id, *told in newest.iter_rows()}
    return [found.get(one, ()) for one in user_ids]


def _write(
    run: Run,
    out: Path,
    prepared: Prepared,
    scorer: Scorer,
    tables: Tables,
    projections: Projections,
    fitted: FittedFusion,
    dataset: Dataset,
    report: dict[str, Any],
) -> None:
    config, base = run.config, prepared.base

    def fill(folder: Path) -> None:
        copy_tree(prepared.adapter, folder / "adapter")
        if base.source.name == BACKBONE:
            copy_tree(base.source.folder, folder / BACKBONE)
        else:
            base.definition.write(folder / BACKBONE)
        _write_tables(folder, tables)
        write_rows(folder / ROWS_FILE, dataset.splits)
        save_file(projections.cpu().state_dict(), folder / "projection.safetensors")
        (folder / "fusion.json").write_text(fitted.fusion.model_dump_json(indent=2) + "\n")

    def manifest(files: dict[str, FileEntry]) -> Manifest:
        d_collab, d_hidden, d_model = projections.sizes
        answers, dtype = prepared.backbone.answers, prepared.dtype
        return Manifest(
            created_by=f"sella {version('sella')}",
            backbone=BackboneEntry(
                source=base.source.name,
                revision=base.source.revision,
                base_id=base.id,
                merged_id=merged_id(base.id, prepared.adapter, dtype),
                dtype=dtype,
                parameters=prepared.backbone.parameters,
                yes_id=answers.yes,
                no_id=answers.no,
            ),
            template=config.template,
            dimensions=Dimensions(
                d_collab=d_collab,
                d_hidden=d_hidden,
                d_model=d_model,
                users=len(tables.user_ids),
                items=len(tables.item_ids),
            ),
            data_fingerprint=dataset.fingerprint(),
            counted_until=_latest(dataset.splits.values()),
            trained_until=_latest([dataset.splits["train"]]),
            splits={name: fingerprint_of({name: frame}) for name, frame in dataset.splits.items()},
            training=config.model_dump(mode="json"),
            seed=config.seed,
            metrics=report,
            reference=_reference(scorer, prepared.examples, fitted.live_B),
            files=files,
        )

    write_bundle(out, manifest, fill)


def _write_tables(folder: Path, tables: Tables) -> None:
    pl.DataFrame(
        {
            "user_id": tables.user_ids,
            "trained": tables.user_trained_U,
            "history": pl.Series([list(one) for one in tables.histories], dtype=pl.List(pl.String)),
            "history_times": pl.Series([list(one) for one in tables.history_times], dtype=pl.List(pl.Float64)),
            "history_total": pl.Series(tables.history_totals, dtype=pl.Int64),
            "outcome_items": pl.Series(
                [[one.item_id for one in told] for told in tables.outcomes], dtype=pl.List(pl.String)
            ),
            "outcome_labels": pl.Series(
                [[one.positive for one in told] for told in tables.outcomes], dtype=pl.List(pl.Boolean)
            ),
            "outcome_times": pl.Series(
                [[one.shown for one in told] for told in tables.outcomes], dtype=pl.List(pl.Float64)
            ),
            "train_impressions": tables.train_impressions_U,
            "since": tables.user_since_U,
            "impressions": tables.user_counts_U2[:, 0],
            "positives": tables.user_counts_U2[:, 1],
        }
    ).write_parquet(folder / "users.parquet")
    pl.DataFrame(
        {
            "item_id": tables.item_ids,
            "title": tables.titles,
            "trained": tables.item_trained_I,
            "impressions": tables.item_counts_I2[:, 0],
            "positives": tables.item_counts_I2[:, 1],
        }
    ).write_parquet(folder / "items.parquet")
    save_file(
        _tensors(
            user_vectors=tables.user_vectors_UC,
            item_vectors=tables.item_vectors_IC,
            fold_vectors=tables.fold_vectors_IC,
            prior_mean=tables.prior.mean_C,
            prior_covariance=tables.prior.covariance_CC,
        ),
        folder / "collab.safetensors",
    )
    save_file(
        _tensors(
            vectors=tables.semantic_ID,
            map_center=tables.text_map.center_D,
            map_weight=tables.text_map.weight_DC,
            map_offset=tables.text_map.offset_C,
        ),
        folder / "semantic.safetensors",
    )
    prior = tables.prior
    fold_in = {
        "target": prior.target,
        "noise": prior.noise,
        "outcome_noise": prior.outcome_noise,
        "strength": prior.strength,
        "drift_variance": prior.drift_variance,
        "drift_seconds": prior.drift_seconds,
    }
    (folder / "fold_in.json").write_text(json.dumps(fold_in, indent=2) + "\n")


def _tensors(**arrays: np.ndarray) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(one)).clone() for name, one in arrays.items()}


def _reference(scorer: Scorer, examples: Examples, scores_B: np.ndarray) -> dict[str, Any]:
    """Describe the validation split's scores and inputs, for the service to compare its traffic with.

    A request has one user at one moment, so the histories are counted once for each user and timestamp of valid.
    """
    valid, rows = examples.dataset.splits["valid"], examples.histories.of_split("valid")
    cold_user_B, cold_item_B = cold_rows(examples.dataset, "valid", scorer.tables)
    moments = valid.select("user_id", "timestamp", length=pl.Series(rows.length))
    lengths_Q = moments.unique(["user_id", "timestamp"], keep="first", maintain_order=True)["length"].to_numpy()
    deciles = np.linspace(0, 1, 11)
    return {
        "score_deciles": [round(float(one), 6) for one in np.quantile(scores_B, deciles)],
        "cold_user_rate": float(cold_user_B.mean()),
        "cold_item_rate": float(cold_item_B.mean()),
        "history_length_deciles": [float(one) for one in np.quantile(lengths_Q, deciles)],
    }


def run_identity(run: Run, dataset: Dataset, backbone: str) -> dict[str, Any]:
    """Return what a run folder belongs to: what is trained begins with these, whenever it is resumed."""
    return {
        "data": dataset.fingerprint(),
        "backbone": backbone,
        "configuration": run.config.model_dump(mode="json"),
        "code": code_version(),
    }
