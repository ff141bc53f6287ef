"""Opening a bundle: verified, then its tables, then its model.

Shapes: U users, I items, C = d_C, D = d_L.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from models.assembly import Assembler
from models.backbone import DTYPES, Backbone, load_backbone, load_tokenizer
from models.bundle import BundleError, Manifest, merged_id, verify
from models.cold import TextMap, UserPrior
from models.definition import Definition
from models.features import Floats, Outcome, Tables
from models.fusion import Fusion
from models.probe import probe
from models.projection import Projections
from models.scoring_model import CACHE_BYTES, ScoringModel
from models.sources import weights_folder
from models.template import Template, window_start
from models.tokens import TextEncoder

PROJECTION = "projection.safetensors"
BACKBONE = "backbone"  # the folder of the tokenizer and config.json, and of the weights if the bundle holds them
OUTCOME_COLUMNS = ("outcome_items", "outcome_labels", "outcome_times")
FP8 = "fp8"
PRECISIONS = (*DTYPES, FP8)


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk; its parts are loaded on demand."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> "Bundle":
        """Verify every file and return the bundle.

        Raises:
            BundleError: names the file that fails.
        """
        return cls(folder, verify(folder))

    @property
    def id(self) -> str:
        """The bundle's id, a sha256 in hex."""
        return self.manifest.bundle_id

    def tables(self) -> Tables:
        """Load the users and items; the large tensors stay memory-mapped."""
        users = pl.read_parquet(self.folder / "users.parquet")
        items = pl.read_parquet(self.folder / "items.parquet")
        collab = _map_tensors(self.folder / "collab.safetensors")
        semantic = _map_tensors(self.folder / "semantic.safetensors")
        fold = json.loads((self.folder / "fold_in.json").read_text())
        self._check_histories(users)
        self._check_outcomes(users, items)
        return Tables(
            user_ids=users["user_id"].to_list(),
            item_ids=items["item_id"].to_list(),
            titles=items["title"].to_list(),
            user_trained_U=users["trained"].to_numpy(),
            item_trained_I=items["trained"].to_numpy(),
            histories=[tuple(one) for one in users["history"].to_list()],
            history_times=[tuple(one) for one in users["history_times"].to_list()],
            history_totals=users["history_total"].to_list(),
            outcomes=_StoredOutcomes(users.select(OUTCOME_COLUMNS)),
            train_impressions_U=users["train_impressions"].to_numpy(),
            user_since_U=users["since"].to_numpy(),
            user_counts_U2=users.select("impressions", "positives").to_numpy(),
            item_counts_I2=items.select("impressions", "positives").to_numpy(),
            user_vectors_UC=collab["user_vectors"],
            item_vectors_IC=collab["item_vectors"],
            fold_vectors_IC=collab["fold_vectors"],
            semantic_ID=semantic["vectors"],
            prior=UserPrior(collab["prior_mean"], collab["prior_covariance"], **fold),
            text_map=TextMap(semantic["map_center"], semantic["map_weight"], semantic["map_offset"]),
        )

    def _check_histories(self, users: pl.DataFrame) -> None:
        """Raise BundleError where a stored history is too short for the template's window, or its times are not its."""
        lengths = users["history"].list.len(), users["history_times"].list.len()
        rows = zip(users["user_id"], *lengths, users["history_total"], strict=True)
        for user_id, stored, timed, total in rows:
            if stored != timed:
                raise BundleError(
                    f"{self.folder / 'users.parquet'}: user {user_id!r} has {stored} stored items and {timed} times"
                )
            wanted = total - window_start(total, self.manifest.template)
            if stored < wanted:
                raise BundleError(
                    f"{self.folder / 'users.parquet'}: user {user_id!r} has {stored} stored items; the window needs"
                    f" {wanted}"
                )

    def _check_outcomes(self, users: pl.DataFrame, items: pl.DataFrame) -> None:
        """Raise BundleError if outcomes are missing, lack a label or a time, or name an item outside the catalogue."""
        for column in (*OUTCOME_COLUMNS, "train_impressions", "since"):
            if column not in users.columns:
                raise BundleError(
                    f"{self.folder / 'users.parquet'}: column '{column}' is missing; train the bundle again"
                )
        lengths = (users[column].list.len() for column in OUTCOME_COLUMNS)
        for user_id, stored, labelled, timed in zip(users["user_id"], *lengths, strict=True):
            if not stored == labelled == timed:
                raise BundleError(
                    f"{self.folder / 'users.parquet'}: user {user_id!r} has {stored} outcomes, {labelled} labels and"
                    f" {timed} times"
                )
        named = users["outcome_items"].explode().drop_nulls()
        unknown = named.filter(~named.is_in(items["item_id"].to_list()))
        if len(unknown):
            raise BundleError(
                f"{self.folder / 'users.parquet'}: outcome of item {unknown[0]!r}, which is not in items.parquet"
            )

    def fusion(self) -> Fusion:
        """Load the weights of `score`."""
        return Fusion.model_validate_json((self.folder / "fusion.json").read_text())

    def backbone(self, *, device: str = "cpu", dtype: str | None = None) -> Backbone:
        """Load the language model, merge its adapter, and probe it.

        `dtype` overrides the bundle's own; scores then differ from its metrics by rounding.

        Raises:
            BundleError: the backbone found is not the one the bundle was trained on.
            BackboneError: it cannot be loaded or fails the probe.
        """
        entry = self.manifest.backbone
        own = self.folder / BACKBONE
        source = own if entry.source == BACKBONE else weights_folder(entry.source, entry.revision)
        backbone = load_backbone(source, definition=own, dtype=torch.float32, device=device)
        base_id = Definition.read(own).identify(backbone.weights_id())
        if base_id != entry.base_id or merged_id(base_id, self.folder / "adapter", entry.dtype) != entry.merged_id:
            raise BundleError(f"backbone {source}: its weights are not those the bundle was trained on")
        backbone.load_lora(self.folder / "adapter")
        backbone.merge_lora(DTYPES[dtype or entry.dtype])
        if (backbone.answers.yes, backbone.answers.no) != (entry.yes_id, entry.no_id):
            raise BundleError(f"backbone {source}: its tokenizer has other ids for Yes and No")
        probe(backbone, Template(self.manifest.template, backbone.encoder))
        return backbone

    def projections(self) -> Projections:
        """Load both projections."""
        sizes = self.manifest.dimensions
        projections = Projections(sizes.d_collab, sizes.d_hidden, sizes.d_model)
        projections.load_state_dict(load_file(self.folder / PROJECTION))
        return projections.requires_grad_(False)

    def model(
        self,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        cache_bytes: int = CACHE_BYTES,
        compiled: bool = False,
    ) -> ScoringModel:
        """Load backbone and projections, ready to score.

        `dtype` is one of `PRECISIONS`, or the bundle's own; in fp8 the products alone are, the rest is bf16.
        `cache_bytes` bounds the prompt beginnings that are kept.
        """
        fp8 = dtype == FP8
        return ScoringModel(
            self.backbone(device=device, dtype="bfloat16" if fp8 else dtype),
            self.projections(),
            identity=self.prompt_identity,
            cache_bytes=cache_bytes,
            fp8=fp8,
            compiled=compiled,
        )

    @property
    def prompt_identity(self) -> str:
        """What keys and values of equal prompts with equal vectors depend on: the weights and the projections."""
        return f"{self.manifest.backbone.merged_id} {self.manifest.files[PROJECTION].sha256}"

    @classmethod
    def open_projections(cls, folder: Path, bundle_id: str) -> "Bundle":
        """Return a bundle of which the manifest and the projections alone are verified: all that an engine needs.

        Raises:
            BundleError: names what is altered, or another bundle lies there.
        """
        manifest = verify(folder, only=PROJECTION)
        if manifest.bundle_id != bundle_id:
            raise BundleError(f"{folder}: holds bundle {manifest.bundle_id[:12]} now, not {bundle_id[:12]}")
        return cls(folder, manifest)

    def encoder(self) -> TextEncoder:
        """Load the tokenizer alone: all that assembling prompts needs of the language model."""
        return TextEncoder(load_tokenizer(self.folder / BACKBONE))

    def assembler(self, encoder: TextEncoder, tables: Tables) -> Assembler:
        """Return the assembler of this bundle's prompts and vectors."""
        return Assembler(Template(self.manifest.template, encoder), tables.prior)


@dataclass(frozen=True)
class _StoredOutcomes(Sequence[tuple[Outcome, ...]]):
    """Each user's outcomes. As columns they take 25 bytes each in memory, as objects 170."""

    columns: pl.DataFrame  # `OUTCOME_COLUMNS`, a list of each for every user

    def __len__(self) -> int:
        return self.columns.height

    def __getitem__(self, row: Any) -> Any:
        return tuple(map(Outcome, *self.columns.row(row)))

    def __iter__(self) -> Iterator[tuple[Outcome, ...]]:
        return (tuple(map(Outcome, *told)) for told in self.columns.iter_rows())


def _map_tensors(path: Path) -> dict[str, Floats]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
