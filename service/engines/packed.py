"""The packed engine's model, as it lives in the worker process.

Shapes: K candidates, N prompts, D = d_L.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from models.assembly import Assembler
from models.bundle import BundleError
from models.cold import UserPrior
from models.features import Floats, ItemFeatures
from models.loading import Bundle
from models.memory import keep_freed_memory
from models.packs import ScoringGroup
from models.scoring_model import ScoringModel
from models.segments import Segment
from models.template import Template
from service.engines.device_memory import device_memory
from service.engines.protocol import EngineUsage, JobFailedError

WARM_UP_CANDIDATES = 16

Work = TypeVar("Work")


@dataclass(frozen=True)
class PackedSource:
    """Where a worker finds its model: a plain message that opens in the worker process."""

    folder: Path
    bundle_id: str
    device: str
    threads: int | None
    batch_tokens: int
    cache_bytes: int
    dtype: str | None = None
    compiled: bool = False

    def open(self) -> "PackedModel":
        """Verify the bundle again, for it may have changed since, and load its model.

        Raises:
            BundleError, BackboneError, TokenizerError: the bundle cannot be served.
        """
        transformers_logging.disable_progress_bar()
        # PEFT's progress bar makes a semaphore of its own, which a killed worker would leave behind.
        tqdm.set_lock(RLock())
        keep_freed_memory()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        bundle = Bundle.open(self.folder)
        if bundle.id != self.bundle_id:
            raise BundleError(f"{self.folder}: holds bundle {bundle.id[:12]} now, not {self.bundle_id[:12]}")
        model = bundle.model(device=device, dtype=self.dtype, cache_bytes=self.cache_bytes, compiled=self.compiled)
        return PackedModel(bundle, model, self.batch_tokens)


class PackedModel:
    """Scores groups and distils titles, each job failing alone."""

    def __init__(self, bundle: Bundle, model: ScoringModel, batch_tokens: int) -> None:
        self._bundle = bundle
        self._model = model
        self._batch_tokens = batch_tokens

    def warm_up(self) -> None:
        """Score a real prompt and distil a title, so that the first request pays for no lazy start.

        Raises:
            JobFailedError: the model gives no finite score.
        """
        sizes = self._bundle.manifest.dimensions
        template = Template(self._bundle.manifest.template, self._model.backbone.encoder)
        prior = UserPrior(
            np.zeros(sizes.d_collab, np.float32), np.eye(sizes.d_collab, dtype=np.float32), target=1.0, noise=1.0
        )
        assembler = Assembler(template, prior)
        title = "A title to warm up with"
        [semantic] = self.distil([[template.distil(assembler.title(title))]])
        if isinstance(semantic, JobFailedError):
            raise semantic
        item = ItemFeatures("warm-up", title, prior.mean_C, prior.mean_C, semantic[0], trained=False)
        group = assembler.group(assembler.user(None, [item], 1), [item] * WARM_UP_CANDIDATES)
        [scores] = self.score([group])
        if isinstance(scores, JobFailedError):
            raise scores

    def score(self, groups: Sequence[ScoringGroup]) -> list[Floats | JobFailedError]:
        """Return each group's raw probabilities, `(K,)`, or its error."""
        return _each_alone(groups, lambda part: self._model.score(part, max_tokens=self._batch_tokens))

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

    def save_weights(self, folder: Path) -> None:
        """Save the merged language model, for an engine that loads it from a folder."""
        self._model.backbone.save(folder)

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
