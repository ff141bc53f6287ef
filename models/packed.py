"""The fast score: one user segment, many candidate segments, one forward. Equal to `models.scorer`.

    row = Row.of([Part(trunk, branches, past), ...])     what one forward computes, laid end to end
    hidden = packed_model.hidden(row, embeds)            last hidden states of the answers

Any architecture of transformers' attention interface will do; `models.probe` compares before anything is scored.

Shapes: T tokens of the row, K branches over all parts, A new tokens of a trunk, L layers, J key/value heads, E
dimensions of a head, D = d_L, N prompts.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.attention import NAME, OwnTokens, PackedLayout, TrunkSpan
from models.backbone import Backbone
from models.fp8 import use_fp8
from models.last_layer import LastLayer
from models.packs import Floats
from models.segments import Segment, SlotKind, fill


@dataclass(frozen=True, slots=True)
class Part:
    """A trunk, the branches behind its end, and the keys and values already known of its beginning."""

    trunk: Segment
    branches: tuple[Segment, ...]
    past_L2JPE: Tensor | None = None

    @property
    def known(self) -> int:
        """How many of the trunk's tokens are known."""
        return 0 if self.past_L2JPE is None else int(self.past_L2JPE.shape[3])

    @property
    def tokens(self) -> int:
        """How many tokens a forward computes for this part."""
        return len(self.trunk) - self.known + sum(map(len, self.branches))


@dataclass(frozen=True, slots=True)
class Row:
    """Parts laid end to end: the trunks' new tokens, then the branches, with nothing between them."""

    token_ids_T: Tensor
    position_ids_T: Tensor
    slots: dict[SlotKind, list[int]]  # places of each kind; users' in part order, the others' in branch order
    layout: PackedLayout

    @classmethod
    def of(cls, parts: Sequence[Part], device: torch.device) -> "Row":
        """Lay out parts; a slot in a known beginning is no slot any more."""
        ids: list[int] = []
        positions: list[int] = []
        slots: dict[SlotKind, list[int]] = {kind: [] for kind in SlotKind}
        new = []
        for part in parts:
            start = len(ids)
            ids.extend(part.trunk.token_ids[part.known :])
            positions.extend(range(part.known, len(part.trunk)))
            new.append(slice(start, len(ids)))
            for kind, index in part.trunk.slots:
                if index >= part.known:
                    slots[kind].append(start + index - part.known)
        trunk_tokens, spans = len(ids), []
        lengths: list[int] = []
        for part, where in zip(parts, new, strict=True):
            start, after = len(ids), len(part.trunk)
            for branch in part.branches:
                for kind, index in branch.slots:
                    slots[kind].append(len(ids) + index)
                ids.extend(branch.token_ids)
                positions.extend(range(after, after + len(branch)))
                lengths.append(len(branch))
            spans.append(TrunkSpan(where, slice(start, len(ids)), len(part.branches), part.past_L2JPE))
        longest = max(len(part.trunk) + max(map(len, part.branches)) for part in parts)
        layout = PackedLayout(tuple(spans), trunk_tokens, OwnTokens.of(lengths, trunk_tokens, device), longest)
        return cls(torch.tensor(ids, device=device), torch.tensor(positions, device=device), slots, layout)


class PackedModel:
    """A backbone's language model under packed attention. It shares the backbone's weights and leaves it as it is."""

    def __init__(self, backbone: Backbone, *, fp8: bool = False, compiled: bool = False) -> None:
        """`fp8` computes the layers' products in 8-bit floats; `compiled` fuses what lies between them.

        Raises:
            BackboneError: the architecture does not take attention functions of transformers' interface.
        """
        self._backbone = backbone
        self._decoder = backbone.twin(NAME).base_model
        if fp8:
            use_fp8(self._decoder)
        if compiled:
            _compile_between_products(self._decoder)
        self._answers_only = _trim_last_layer(self._decoder)

    @torch.inference_mode()
    def hidden(self, row: Row, embeds_TD: Tensor) -> Tensor:
        """Return the answers' last hidden states, after the final norm, (K, D)."""
        out = self._decoder(
            inputs_embeds=embeds_TD[None],
            position_ids=row.position_ids_T[None],
            use_cache=False,
            packed=row.layout,
        )
        hidden_TD: Tensor = out.last_hidden_state[0]
        return hidden_TD if self._answers_only else hidden_TD[row.layout.own.answers_N]

    @torch.inference_mode()
    def distil(
        self,
        prompts: Sequence[Segment],
        max_tokens: int = 4096,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Floats:
        """Return the last hidden state of each prompt, `(N, D)` fp32: an item's semantic vector (Fig. 3).

        `progress` is called after every forward with the number of prompts done and the number of all prompts.
        """
        out = np.empty((len(prompts), self._backbone.d_model), np.float32)
        start = 0
        for together in fill(prompts, max_tokens):
            row = Row.of([Part(Segment(()), together)], self._backbone.device)
            hidden_KD = self.hidden(row, self._backbone.embed(row.token_ids_T))
            out[start : start + len(together)] = hidden_KD.float().cpu().numpy()
            start += len(together)
            progress(start, len(prompts))
        return out


def _compile_between_products(decoder: Any) -> None:
    """Compile norms and MLPs, for any number of tokens; attention is a kernel already."""
    for layer in decoder.layers:
        for name, module in layer.named_children():
            if "norm" in name or "mlp" in name:
                module.compile(dynamic=True)


def _trim_last_layer(decoder: Any) -> bool:
    """Let the answers alone leave the last layer, where the architecture is built so that this can be done."""
    layers = getattr(decoder, "layers", None)
    if not layers or "position_embeddings" not in inspect.signature(layers[-1].forward).parameters:
        return False
    layers[-1] = LastLayer(layers[-1])
    return True


def computed_of(layout: PackedLayout) -> list[Tensor]:
    """Return each trunk's newly computed keys and values after a forward, (L, 2, J, A, E)."""
    return [torch.stack(layers) for layers in zip(*layout.kept_L, strict=True)]
