"""vLLM as the service uses it: a prompt a candidate, ids and embeddings mixed, its prefix cache on."""

import asyncio
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loadtests.bench.shapes import NO, YES, ModelShape
from loadtests.bench.weights import load_projections
from models.backbone import DTYPES
from models.packs import ScoringGroup
from models.tokens import AnswerTokens
from service.engines.vllm_config import CoreConfig
from service.engines.vllm_core import VllmCore
from service.engines.vllm_prompts import PromptWriter

KV_GIB = 4.0  # more users than a run has, so that a warm one is still there
FORWARD_LIMIT_S = 600.0


class VllmScorer:
    """Candidates of a request go to vLLM at once; it batches them as it likes, and finds their user segment cached."""

    def __init__(self, model: ModelShape, weights: Path) -> None:
        self._writer = PromptWriter(load_projections(model, weights), DTYPES[model.dtype], "bench")
        config = CoreConfig(
            weights=weights,
            dtype=model.dtype,
            answers=AnswerTokens(YES, NO),
            max_tokens=1024,
            tensor_parallel=1,
            data_parallel=1,
            gpu_memory=0.9,
            kv_gib=KV_GIB,
            eager=False,
        )
        self._loop = asyncio.new_event_loop()
        self._core = VllmCore(config, FORWARD_LIMIT_S)
        self._loop.run_until_complete(self._core.open([]))
        self._sent = 0

    def score(self, group: ScoringGroup) -> NDArray[np.float32]:
        """Score the candidates, each by a prompt of its own."""
        prompts = self._writer.write(group)
        self._sent += sum(len(prompt.token_ids) for prompt in prompts)
        logits_K = np.array(self._loop.run_until_complete(self._core.ask(prompts)))
        scores: NDArray[np.float32] = (1 / (1 + np.exp(-logits_K))).astype(np.float32)
        return scores

    def tokens(self) -> int:
        """Return how many tokens were computed so far: what was sent less what was found cached."""
        return self._sent - self._core.cached_tokens

    def close(self) -> None:
        """End vLLM's processes."""
        self._loop.run_until_complete(self._core.close())
        self._loop.close()
