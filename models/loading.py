"""Opening a bundle: verified, then its tables, then its model.

Shapes: U users, I items, C = d_C, D = d_L.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from models.assembly import Assembler
from models.backbone import DTYPES, Backbone, load_backbone, load_tokenizer
from models.bundle import ADAPTER, BundleError, Manifest, merged_id, read_verified, verify
from models.cold import TextMap, UserPrior
from models.contents import (
    OUTCOMES,
    read_collab,
    read_fold_in,
    read_fusion,
    read_items,
    read_semantic,
    read_tensors,
    read_users,
)
from models.definition import NAMES as DEFINITION
from models.definition import Definition
from models.features import Outcome, Tables
from models.fusion import Fusion
from models.probe import probe
from models.projection import Projections
from models.scoring_model import CACHE_BYTES, ScoringModel
from models.sources import weights_folder
from models.template import Template
from models.tokens import TextEncoder

USERS_FILE, ITEMS_FILE = "users.parquet", "items.parquet"
COLLAB, SEMANTIC, PROJECTION = "collab.safetensors", "semantic.safetensors", "projection.safetensors"
FOLD_IN, FUSION = "fold_in.json", "fusion.json"
BACKBONE = "backbone"  # the folder of the tokenizer and config.json, and of the weights if the bundle holds them
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
        """Load the users and items into this process's own memory.

        Raises:
            BundleError: names the file that is altered, or holds what cannot be served.
        """
        sizes = self.manifest.dimensions
        items = read_items(*self._file(ITEMS_FILE), sizes.items)
        users = read_users(*self._file(USERS_FILE), sizes.users, self.manifest.template, items["item_id"])
        collab = read_collab(*self._file(COLLAB), sizes)
        semantic = read_semantic(*self._file(SEMANTIC), sizes)
        fold = read_fold_in(*self._file(FOLD_IN))
        return Tables(
            user_ids=users["user_id"].to_list(),
            item_ids=items["item_id"].to_list(),
            titles=items["title"].to_list(),
            user_trained_U=users["trained"].to_numpy(),
            item_trained_I=items["trained"].to_numpy(),
            histories=[tuple(one) for one in users["history"].to_list()],
            history_times=[tuple(one) for one in users["history_times"].to_list()],
            history_totals=users["history_total"].to_list(),
            outcomes=_StoredOutcomes(users.select(*OUTCOMES)),
            train_impressions_U=users["train_impressions"].to_numpy(),
            user_since_U=users["since"].to_numpy(),
            user_counts_U2=users.select("impressions", "positives").to_numpy(),
            item_counts_I2=items.select("impressions", "positives").to_numpy(),
            user_vectors_UC=collab["user_vectors"],
            item_vectors_IC=collab["item_vectors"],
            fold_vectors_IC=collab["fold_vectors"],
            semantic_ID=semantic["vectors"],
            # Copies: what outlives the tables must not keep the memory of a whole file.
            prior=UserPrior(collab["prior_mean"].copy(), collab["prior_covariance"].copy(), **fold.model_dump()),
            text_map=TextMap(*(semantic[name].copy() for name in ("map_center", "map_weight", "map_offset"))),
        )

    def fusion(self) -> Fusion:
        """Load the weights of `score`.

        Raises:
            BundleError: fusion.json is altered, or holds a weight that cannot be used.
        """
        return read_fusion(*self._file(FUSION))

    def _file(self, name: str) -> tuple[NDArray[np.uint8], Path]:
        """Return a file's bytes, checked as they are read, and its path for messages."""
        return read_verified(self.folder, self.manifest, name), self.folder / name

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
        _leave_files(backbone)
        base_id = Definition.read(own).identify(backbone.weights_id())
        if base_id != entry.base_id:
            raise BundleError(f"backbone {source}: its weights are not those the bundle was trained on")
        if backbone.d_model != self.manifest.dimensions.d_model:
            raise BundleError(
                f"backbone {source}: it is {backbone.d_model} wide; the manifest's dimensions say"
                f" {self.manifest.dimensions.d_model}"
            )
        _check_finite(backbone, f"backbone {source}")
        backbone.load_lora(self.folder / ADAPTER)
        if merged_id(base_id, self.folder / ADAPTER, entry.dtype) != entry.merged_id:  # as it is after it was read
            raise BundleError(f"{self.folder / ADAPTER}: altered since it was written")
        _check_finite(backbone, str(self.folder / ADAPTER))
        backbone.merge_lora(DTYPES[dtype or entry.dtype])
        if (backbone.answers.yes, backbone.answers.no) != (entry.yes_id, entry.no_id):
            raise BundleError(f"backbone {source}: its tokenizer has other ids for Yes and No")
        probe(backbone, Template(self.manifest.template, backbone.encoder))
        return backbone

    def projections(self) -> Projections:
        """Load both projections.

        Raises:
            BundleError: the file is altered, or holds what cannot be served.
        """
        sizes = self.manifest.dimensions
        with torch.device("meta"):
            projections = Projections(sizes.d_collab, sizes.d_hidden, sizes.d_model)
        shapes = {name: tuple(one.shape) for name, one in projections.state_dict().items()}
        tensors = read_tensors(*self._file(PROJECTION), shapes)
        if not (tensors["collab.spread_C"] > 0).all():
            raise BundleError(
                f"{self.folder / PROJECTION}: tensor 'collab.spread_C' holds a spread that is not positive"
            )
        projections.load_state_dict({name: torch.tensor(one) for name, one in tensors.items()}, assign=True)
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
        """Load the tokenizer alone: all that assembling prompts needs of the language model.

        Raises:
            BundleError: it was altered while it was loaded.
        """
        encoder = TextEncoder(load_tokenizer(self.folder / BACKBONE))
        for name in (f"{BACKBONE}/{one}" for one in DEFINITION):
            if name in self.manifest.files:
                read_verified(self.folder, self.manifest, name)
        return encoder

    def assembler(self, encoder: TextEncoder, tables: Tables) -> Assembler:
        """Return the assembler of this bundle's prompts and vectors."""
        return Assembler(Template(self.manifest.template, encoder), tables.prior)


@dataclass(frozen=True)
class _StoredOutcomes(Sequence[tuple[Outcome, ...]]):
    """Each user's outcomes. As columns they take 25 bytes each in memory, as objects 170."""

    columns: pl.DataFrame  # `OUTCOMES`, a list of each for every user

    def __len__(self) -> int:
        return self.columns.height

    def __getitem__(self, row: Any) -> Any:
        return tuple(map(Outcome, *self.columns.row(row)))

    def __iter__(self) -> Iterator[tuple[Outcome, ...]]:
        return (tuple(map(Outcome, *told)) for told in self.columns.iter_rows())


def _leave_files(backbone: Backbone) -> None:
    """Copy weights that are mapped from their file: a file that changes or shrinks would change or end the process."""
    with torch.no_grad():
        for tensor in (*backbone.causal_lm.parameters(), *backbone.causal_lm.buffers()):
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.clone()


def _check_finite(backbone: Backbone, where: str) -> None:
    """Raise BundleError if a weight is not finite: a token that the probe's prompts lack would show it much later."""
    for name, tensor in backbone.causal_lm.named_parameters():
        if tensor.numel() and not bool(torch.isfinite(torch.stack(tensor.detach().aminmax())).all()):
            raise BundleError(f"{where}: tensor '{name}' holds a value that is not finite")
