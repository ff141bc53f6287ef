"""The packed engine's model, as it lives in the worker process.

Shapes: K candidates, N prompts, D = d_L.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from models.assembly import Assembler
from models.backbone import BackboneError
from models.bundle import BundleError
from models.cold import UserPrior
from models.definition import TOKENIZER, TOKENIZER_CONFIG
from models.features import Floats, ItemFeatures
from models.loading import BACKBONE, Bundle
from models.memory import keep_freed_memory
from models.packs import ScoringGroup
from models.probe import check_window, prove
from models.projected import SlotVectors
from models.scoring_model import NotFiniteError, ScoringModel
from models.segments import Segment
from models.template import Template
from models.tokens import TokenizerError
from service.engines.device_memory import device_memory
from service.engines.protocol import BundlePlace, EngineUsage, JobFailedError

WARM_UP_CANDIDATES = 16

Work = TypeVar("Work")


@dataclass(frozen=True)
class PackedSource:
    """Where a worker finds its model: a plain message that opens in the worker process.

    All `places` hold bundles of the same merged weights; any of them will do to load these from.
    """

    places: tuple[BundlePlace, ...]
    device: str
    threads: int | None
    batch_tokens: int
    cache_bytes: int
    dtype: str | None = None
    compiled: bool = False

    def open(self, *, gently: bool = False) -> "PackedModel":
        """Verify the first bundle again, for it may have changed since, load its model, and attach the others.

        Raises:
            BundleError, BackboneError, TokenizerError: no bundle can be served; the first one's error.
        """
        transformers_logging.disable_progress_bar()
        # PEFT's progress bar makes a semaphore of its own, which a killed worker would leave behind.
        tqdm.set_lock(RLock())
        keep_freed_memory()
        threads = self.threads or torch.get_num_threads()
        torch.set_num_threads(1 if gently else threads)
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        bundle, model, refused = self._first_good(device)
        packed = PackedModel(bundle, model, self.batch_tokens, threads, self.places)
        for place in self.places:
            if place.bundle_id in (bundle.id, *refused):
                continue
            try:
                packed.attach(place)()
            except (BundleError, BackboneError, OSError) as error:  # it must not take those with it that are whole
                refused[place.bundle_id] = str(error)
        packed.refused.update(refused)
        return packed

    def with_place(self, place: BundlePlace) -> "PackedSource":
        """Return the source with one bundle more."""
        return replace(self.without(place.bundle_id), places=(*self.without(place.bundle_id).places, place))

    def without(self, bundle_id: str) -> "PackedSource":
        """Return the source with one bundle less."""
        return replace(self, places=tuple(one for one in self.places if one.bundle_id != bundle_id))

    def _first_good(self, device: str) -> tuple[Bundle, ScoringModel, dict[str, str]]:
        """Return the first bundle whose model can be loaded, the model, and why those before it cannot."""
        errors: dict[str, Exception] = {}
        for place in self.places:
            try:
                bundle = Bundle.open(place.folder)
                if bundle.id != place.bundle_id:
                    raise BundleError(f"{place.folder}: holds bundle {bundle.id[:12]} now, not {place.bundle_id[:12]}")
                model = bundle.model(
                    device=device, dtype=self.dtype, cache_bytes=self.cache_bytes, compiled=self.compiled
                )
                return bundle, model, {bundle_id: str(error) for bundle_id, error in errors.items()}
            except (BundleError, BackboneError, TokenizerError, OSError) as error:
                errors[place.bundle_id] = error
        raise next(iter(errors.values()))


class PackedModel:
    """Scores groups and distils titles, each job failing alone."""

    def __init__(
        self,
        bundle: Bundle,
        model: ScoringModel,
        batch_tokens: int,
        threads: int | None = None,
        places: Sequence[BundlePlace] = (),
    ) -> None:
        """`places` are those that the model was opened with: `warm_up` proves the one that it is made of."""
        self._bundle = bundle
        self._places = places
        self._model = model
        self._batch_tokens = batch_tokens
        self._threads = threads
        self._vectors = {bundle.id: model.vectors}
        self.refused: dict[str, str] = {}  # why a bundle could not be attached

    def attach(self, place: BundlePlace) -> Callable[[], None]:
        """Load the projections of another bundle of the same weights; may run in a thread beside `score`.

        Returns what has the bundle served, after its proof: to be called by the thread that scores.

        Raises:
            BundleError, BackboneError: it is altered, another one lies there, its weights are others, or its prompts do
                not fit. What is returned raises the same where the proof fails.
        """
        bundle = Bundle.open_projections(place.folder, place.bundle_id)
        ours, theirs = self._bundle.manifest, bundle.manifest
        if theirs.backbone.merged_id != ours.backbone.merged_id:
            raise BundleError(f"{place.folder}: its merged weights are not those that are loaded")
        for name in (f"{BACKBONE}/{one}" for one in (TOKENIZER, TOKENIZER_CONFIG)):
            if theirs.files.get(name) != ours.files.get(name):
                raise BundleError(f"{place.folder / name}: not that of the merged weights that the manifest names")
        if (theirs.backbone.yes_id, theirs.backbone.no_id) != (ours.backbone.yes_id, ours.backbone.no_id):
            raise BundleError(f"{place.folder}: it has other ids for Yes and No than its tokenizer")
        backbone = self._model.backbone
        if theirs.dimensions.d_model != backbone.d_model:
            raise BundleError(f"{place.folder}: d_model is {theirs.dimensions.d_model}, not {backbone.d_model}")
        check_window(backbone, Template(theirs.template, backbone.encoder))
        vectors = self._model.slot_vectors(bundle.projections(), bundle.prompt_identity)

        def serve() -> None:
            self._prove(place, vectors)
            self._vectors[bundle.id] = vectors
            self.refused.pop(bundle.id, None)

        return serve

    def detach(self, bundle_id: str) -> None:
        """Free a bundle's projections."""
        self.refused.pop(bundle_id, None)
        vectors = self._vectors.pop(bundle_id, None)
        if vectors is not None:
            vectors.clear()

    def begin(self) -> None:
        """Set the threads of the thread that computes: torch counts them for each that asks."""
        if self._threads is not None:
            torch.set_num_threads(self._threads)

    def warm_up(self) -> None:
        """Score a real prompt and distil a title, so that the first request pays for no lazy start.

        Raises:
            JobFailedError: the model gives no finite score.
        """
        sizes = self._bundle.manifest.dimensions
        template = Template(self._bundle.manifest.template, self._model.backbone.encoder)
        width = sizes.d_collab
        prior = UserPrior(np.zeros(width, np.float32), np.eye(width, dtype=np.float32), 1.0, 1.0, 1.0, 1.0)
        assembler = Assembler(template, prior)
        title = "A title to warm up with"
        [semantic] = self.distil([[template.distil(assembler.title(title))]])
        if isinstance(semantic, JobFailedError):
            raise semantic
        item = ItemFeatures("warm-up", title, prior.mean_C, prior.mean_C, semantic[0], trained=False)
        group = assembler.group(assembler.user(None, [item], 1), [item] * WARM_UP_CANDIDATES)
        [scores] = self.score([group], [self._bundle.id])
        if isinstance(scores, JobFailedError):
            raise scores
        for place in self._places:
            if place.bundle_id == self._bundle.id:
                self._prove(place, self._model.vectors)

    def score(self, groups: Sequence[ScoringGroup], bundle_ids: Sequence[str] = ()) -> list[Floats | JobFailedError]:
        """Return each group's logits, `(K,)`, or its error.

        Each group is computed with its bundle's projections; without `bundle_ids` with the first bundle's.
        """
        works = list(zip(groups, bundle_ids or [self._bundle.id] * len(groups), strict=True))
        return _each_alone(works, self._score)

    def distil(self, jobs: Sequence[Sequence[Segment]]) -> list[Floats | JobFailedError]:
        """Return each job's vectors, `(N, D)`, or its error."""
        return _each_alone(jobs, self._distil)

    def usage(self) -> EngineUsage:
        """Return what was computed so far, and the memory in use."""
        counts = self._model.counts
        device = self._model.backbone.device
        used, total = device_memory(device)
        return EngineUsage(
            forwards=counts.forwards,
            tokens=counts.tokens,
            tokens_cached=counts.cache.tokens_found,
            tokens_saved_by_packing=counts.tokens_saved,
            cache_bytes=counts.cache.bytes_held,
            memory_bytes=used,
            memory_total_bytes=total,
            device=str(device),
        )

    def forget(self) -> None:
        """Drop what is kept of prompts and vectors."""
        self._model.forget()
        for vectors in self._vectors.values():
            vectors.clear()

    def save_weights(self, folder: Path) -> None:
        """Save the merged language model, for an engine that loads it from a folder."""
        self._model.backbone.save(folder)

    def _score(self, works: Sequence[tuple[ScoringGroup, str]]) -> list[Floats]:
        vectors = [self._attached(bundle_id) for _, bundle_id in works]
        return self._model.logits([group for group, _ in works], self._batch_tokens, vectors)

    def _prove(self, place: BundlePlace, vectors: SlotVectors) -> None:
        """Score a bundle's own prompt as it will be served, and by the reference.

        Raises:
            BundleError: a logit is not finite, or not the reference's.
        """
        if place.proof is None:
            return
        try:
            prove(self._model, place.proof, vectors, self._batch_tokens)
        except (NotFiniteError, BackboneError) as error:
            raise BundleError(f"{place.folder}: the prompt that proves it: {error}") from error

    def _attached(self, bundle_id: str) -> SlotVectors:
        if not bundle_id:  # from a caller who serves one alone
            return self._model.vectors
        vectors = self._vectors.get(bundle_id)
        if vectors is None:
            reason = self.refused.get(bundle_id, "it was never attached, or has been freed")
            raise LookupError(f"bundle {bundle_id[:12]} is not loaded: {reason}")
        return vectors

    def _distil(self, jobs: Sequence[Sequence[Segment]]) -> list[Floats]:
        prompts = [prompt for job in jobs for prompt in job]
        vectors_ND = self._model.distil(prompts, max_tokens=self._batch_tokens)
        if not np.isfinite(vectors_ND).all():
            raise ArithmeticError("a distilled vector is not finite")
        ends = np.cumsum([len(job) for job in jobs])[:-1]
        return np.split(vectors_ND, ends)


def _each_alone(
    works: Sequence[Work], compute: Callable[[Sequence[Work]], list[Floats]]
) -> list[Floats | JobFailedError]:
    """Compute works together; if that fails, one by one, so that only the guilty one carries the error.

    Any exception counts: what a kernel raises is not ours to list, and the worker must go on.
    """
    try:
        return list(compute(works))
    except Exception as error:
        if len(works) == 1:
            return [JobFailedError(f"{type(error).__name__}: {error}")]
    return [one for work in works for one in _each_alone([work], compute)]
