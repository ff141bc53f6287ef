"""Prompts as vLLM takes them: ids and embeddings mixed, a vector in each slot and zeros everywhere else.

Shapes: K candidates, T tokens of one prompt, D = d_L.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from models.packs import ScoringGroup
from models.projection import Projections
from models.segments import Segment, SlotKind


@dataclass(frozen=True, slots=True)
class MixedPrompt:
    """One branch with its trunk: vLLM takes a token's id, or its row of `embeds_TD` where it is a slot."""

    token_ids: list[int]
    is_token: list[bool]
    embeds_TD: Tensor
    cache_salt: str


class PromptWriter:
    """Writes a group's branches as mixed prompts, in the model's dtype.

    vLLM finds a cached prefix by the hash of ids, embeddings and salt, and leaves the mask of slots out. Rows outside
    the slots are zero here, so rows alone tell where the slots are, unless a slot's vector is itself zero: such a
    prompt has its slots in its salt. The salt names the weights, for a cache may outlive a model.
    """

    def __init__(self, projections: Projections, dtype: torch.dtype, weights_id: str) -> None:
        self._projections = projections.eval()
        self._dtype = dtype
        self._weights_id = weights_id

    @torch.inference_mode()
    def write(self, group: ScoringGroup) -> list[MixedPrompt]:
        """Return the prompt of each candidate, `(K,)`; nothing is padded.

        Raises:
            ArithmeticError: a vector is not finite. In vLLM's cache it would spoil other prompts.
        """
        user_1D = self._projections.collab(torch.from_numpy(group.user_1C)).to(self._dtype)
        item_KD = self._projections.collab(torch.from_numpy(group.item_KC)).to(self._dtype)
        warm_KD = self._projections.warm(torch.from_numpy(group.semantic_KD)).to(self._dtype)
        for name, vectors in (("user", user_1D), ("item", item_KD), ("semantic", warm_KD)):
            if not vectors.isfinite().all():
                raise ArithmeticError(f"a projected {name} vector is not finite")
        trunk = group.pack.trunk
        prompts = []
        for item_D, warm_D, branch in zip(item_KD, warm_KD, group.pack.branches, strict=True):
            rows = {SlotKind.USER: user_1D[0], SlotKind.ITEM: item_D, SlotKind.WARM: warm_D}
            shared = tuple((kind, index) for kind, index in trunk.slots if index < branch.attach)
            prompt = Segment(trunk.token_ids[: branch.attach], shared) + branch.segment
            prompts.append(self._mix(prompt, rows))
        return prompts

    def _mix(self, prompt: Segment, rows: dict[SlotKind, Tensor]) -> MixedPrompt:
        embeds_TD = torch.zeros(len(prompt), len(rows[SlotKind.WARM]), dtype=self._dtype)
        is_token = [True] * len(prompt)
        for kind, index in prompt.slots:
            embeds_TD[index] = rows[kind]
            is_token[index] = False
        salt = self._weights_id
        if any(not rows[kind].any() for kind, _ in prompt.slots):
            where = ",".join(str(index) for _, index in prompt.slots)
            salt = hashlib.sha256(f"{salt} zero among slots {where}".encode()).hexdigest()
        return MixedPrompt(list(prompt.token_ids), is_token, embeds_TD, salt)
