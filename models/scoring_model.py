"""A backbone with its projections: what an engine holds, and what evaluation runs.

Shapes: K candidates, N prompts, T tokens of a forward, D = d_L.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, repeat
from operator import itemgetter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.backbone import Backbone
from models.packed import PackedModel, Part, Row, computed_of
from models.packs import Floats, ScoringGroup, room
from models.prefix_cache import CacheCounts, PrefixCache, chunk_names
from models.projected import ProjectedRows, SlotVectors
from models.projection import Projections
from models.segments import Segment, SlotKind

CACHE_BYTES = (
    256 * 2**20
)  # some twenty thousand tokens of a 0.5B model in bf16: several users' segments, for lists that take several forwards


class NotFiniteError(ArithmeticError):
    """A logit came out as NaN or infinite."""


@dataclass(frozen=True, slots=True)
class ForwardCounts:
    """What a model has computed so far."""

    forwards: int
    tokens: int
    tokens_saved: int  # of prompts that shared their trunk within a forward
    cache: CacheCounts


class ScoringModel:
    """Scores groups and distils titles with frozen weights."""

    def __init__(
        self,
        backbone: Backbone,
        projections: Projections,
        *,
        identity: str = "",
        cache_bytes: int = CACHE_BYTES,
        fp8: bool = False,
        compiled: bool = False,
    ) -> None:
        """`identity` names the weights and projections; the cache's entries carry it, beside the weights' type.

        `fp8` and `compiled` are `PackedModel`'s.
        """
        self.backbone = backbone
        self.fp8 = fp8
        self.projections = projections.to(backbone.device).eval()
        self._packed = PackedModel(backbone, fp8=fp8, compiled=compiled)
        self._precision = f"{backbone.dtype} {'fp8' if fp8 else ''}"
        self._cache = PrefixCache(cache_bytes)
        self.vectors = self.slot_vectors(self.projections, identity)
        self._forwards = self._tokens = self._saved = 0

    @property
    def counts(self) -> ForwardCounts:
        """What has been computed so far."""
        return ForwardCounts(self._forwards, self._tokens, self._saved, self._cache.counts)

    def slot_vectors(self, projections: Projections, identity: str) -> SlotVectors:
        """Return other projections for the same weights; `identity` names both."""
        like = torch.empty(0, dtype=self.backbone.dtype, device=self.backbone.device)
        return SlotVectors(projections, f"{identity} {self._precision}", self.backbone.d_model, like)

    @torch.inference_mode()
    def logits(
        self, groups: Sequence[ScoringGroup], max_tokens: int = 4096, vectors: Sequence[SlotVectors] | None = None
    ) -> list[Floats]:
        """Return log p(Yes) - log p(No) of each group's candidates, `(K,)` fp32 in candidate order.

        `vectors` are those of each group's slots; without it they are the model's own. A group longer than `max_tokens`
        takes several forwards, each as long as `room` says, and its trunk is computed in the first; shorter ones share
        forwards.

        Raises:
            NotFiniteError: a logit is not finite; names the group.
        """
        logits = [np.empty(len(group.pack.branches), np.float32) for group in groups]
        each = repeat(self.vectors) if vectors is None else vectors
        parts = chain.from_iterable(map(self._parts, groups, logits, repeat(max_tokens), each))
        for trunks in _batches(parts, max_tokens):
            self._forward(trunks)
        for index, logits_K in enumerate(logits):
            if not np.isfinite(logits_K).all():
                raise NotFiniteError(f"group {index}: {int((~np.isfinite(logits_K)).sum())} logits are not finite")
        return logits

    def score(self, groups: Sequence[ScoringGroup], max_tokens: int = 4096) -> list[NDArray[np.float64]]:
        """Return each group's raw scores, `(K,)`: the probabilities of its logits."""
        return [torch.from_numpy(logits_K).double().sigmoid().numpy() for logits_K in self.logits(groups, max_tokens)]

    def distil(self, prompts: Sequence[Segment], max_tokens: int = 4096) -> Floats:
        """Return the semantic vector of each prompt of Fig. 3, `(N, D)` fp32."""
        return self._packed.distil(prompts, max_tokens)

    def _parts(
        self, group: ScoringGroup, logits_K: Floats, max_tokens: int, vectors: SlotVectors
    ) -> Iterator["_GroupPart"]:
        """Yield a group's parts of at most `max_tokens`."""
        trunk = group.pack.trunk
        if any(branch.attach != len(trunk) for branch in group.pack.branches):
            raise ValueError("a branch attaches inside the trunk; only `models.prompt_tree` computes that")
        names = chunk_names(vectors.identity, trunk, [group.user_1C.tobytes()] * len(trunk.slots))
        start = 0
        for part in group.parts(max_tokens):
            end = start + len(part.pack.branches)
            yield _GroupPart(part, names, logits_K[start:end], vectors)
            start = end

    def forget(self) -> None:
        """Forget what is kept of prompts and vectors: what follows is then equal to the bit, whatever came before."""
        self._cache.clear()
        self.vectors.clear()

    def _forward(self, trunks: Sequence["_Trunk"]) -> None:
        """Compute one forward and write every group's logits."""
        parts = [
            Part(trunk.segment, trunk.branches, self._cache.find(trunk.names, len(trunk.segment))) for trunk in trunks
        ]
        row = Row.of(parts, self.backbone.device)
        hidden_KD = self._packed.hidden(row, self._embed(row, trunks, parts))
        for trunk, part, computed in zip(trunks, parts, computed_of(row.layout), strict=True):
            if part.known < len(part.trunk):
                self._cache.keep(trunk.names, part.known, computed)
        logits_K = self.backbone.answer_logits(hidden_KD).cpu().numpy()
        start = 0
        for one in chain.from_iterable(trunk.parts for trunk in trunks):
            end = start + len(one.logits_K)
            one.logits_K[:] = logits_K[start:end]
            start = end
        self._forwards += 1
        self._tokens += len(row.token_ids_T)
        self._saved += sum(len(part.trunk) * (len(part.branches) - 1) for part in parts)

    def _embed(self, row: Row, trunks: Sequence["_Trunk"], parts: Sequence[Part]) -> Tensor:
        """Return the row's embeddings, (T, D), with the projected vectors in place of the slots' (Eq. 10)."""
        embeds_TD = self.backbone.embed(row.token_ids_T)
        users = [
            (trunk.parts[0].vectors.collab, trunk.parts[0].group.user_1C)
            for trunk, part in zip(trunks, parts, strict=True)
            if any(index >= part.known for _, index in part.trunk.slots)
        ]
        each = [one for trunk in trunks for one in trunk.parts]
        if users:
            embeds_TD[row.slots[SlotKind.USER]] = _project(users)
        embeds_TD[row.slots[SlotKind.ITEM]] = _project([(one.vectors.collab, one.group.item_KC) for one in each])
        embeds_TD[row.slots[SlotKind.WARM]] = _project([(one.vectors.warm, one.group.semantic_KD) for one in each])
        return embeds_TD


@dataclass(frozen=True, slots=True)
class _GroupPart:
    """A part of a group, its trunk's chunks' names in the cache, and where its logits go."""

    group: ScoringGroup
    names: list[bytes]
    logits_K: Floats  # a view into the group's own
    vectors: SlotVectors

    @property
    def own_tokens(self) -> int:
        return self.group.pack.tokens - len(self.group.pack.trunk)


@dataclass(frozen=True, slots=True)
class _Trunk:
    """A trunk of one forward, and the parts behind it: of one list, or of several requests of a user."""

    parts: list[_GroupPart]

    @property
    def names(self) -> list[bytes]:
        return self.parts[0].names

    @property
    def segment(self) -> Segment:
        return self.parts[0].group.pack.trunk

    @property
    def branches(self) -> tuple[Segment, ...]:
        return tuple(branch.segment for one in self.parts for branch in one.group.pack.branches)


def _project(rows: Sequence[tuple[ProjectedRows, Floats]]) -> Tensor:
    """Return the projected vectors in order; neighbours of one projection are computed together."""
    runs = [(one, [vectors for _, vectors in run]) for one, run in groupby(rows, key=itemgetter(0))]
    return torch.cat([project(np.concatenate(vectors)) for project, vectors in runs])


def _batches(parts: Iterable[_GroupPart], max_tokens: int) -> Iterator[list[_Trunk]]:
    """Fill forwards in order; parts of equal text and equal vectors share a trunk."""
    trunks: dict[bytes, _Trunk] = {}
    tokens = most = 0
    for part in parts:
        key = part.names[-1] if part.names else b""
        added = part.own_tokens if key in trunks else part.group.pack.tokens
        if trunks and tokens + added > most:
            yield list(trunks.values())
            trunks, tokens, added = {}, 0, part.group.pack.tokens
        if not trunks:
            most = room(len(part.group.pack.trunk), max_tokens)
        trunks.setdefault(key, _Trunk([])).parts.append(part)
        tokens += added
    if trunks:
        yield list(trunks.values())
