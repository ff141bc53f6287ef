"""What vLLM is started with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.tokens import AnswerTokens
from service.engines.vllm_worker import EXTENSION

GIB = 2**30


@dataclass(frozen=True)
class CoreConfig:
    """What vLLM is started with."""

    weights: Path
    dtype: str
    answers: AnswerTokens
    max_tokens: int  # of one prompt, the answer included
    tensor_parallel: int = 1
    data_parallel: int = 1
    gpu_memory: float = 0.6
    kv_gib: float | None = None
    eager: bool = False

    def engine_args(self, *, on_cpu: bool) -> dict[str, Any]:
        """Return the arguments of vLLM's `AsyncEngineArgs`."""
        return {
            "model": str(self.weights),
            "skip_tokenizer_init": True,  # ids alone are sent, and AutoTokenizer would replace a custom tokenizer
            "enable_prompt_embeds": True,
            "enable_prefix_caching": True,
            "dtype": self.dtype,
            # The two logits are subtracted: in bf16 the difference of two large ones keeps two digits.
            "hf_overrides": {"head_dtype": "float32"},
            "generation_config": "vllm",  # a model's own sampling defaults are not for scoring
            "max_model_len": self.max_tokens,
            # A trunk shorter than one block is never shared; 32 is the least that the CPU build takes.
            "block_size": 32 if on_cpu else None,
            "tensor_parallel_size": self.tensor_parallel,
            "data_parallel_size": self.data_parallel,
            "gpu_memory_utilization": self.gpu_memory,
            "kv_cache_memory_bytes": None if self.kv_gib is None else int(self.kv_gib * GIB),
            "enforce_eager": self.eager,
            "worker_extension_cls": EXTENSION,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
