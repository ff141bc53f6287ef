"""Softmax attention that also returns its log-sum-exp, on the kernels that torch has for each device.

torch's public `scaled_dot_product_attention` keeps the log-sum-exp to itself, so the kernels beneath it are called.

Shapes: B sequences, H query heads, J key/value heads (H a multiple of J), T queries, P keys, E dimensions of a head.
"""

import torch
from torch import Tensor

_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_FLASH_MULTIPLE = 8  # of the head's dimensions, which the CUDA kernel asks for


def attend(
    query_BHTE: Tensor, key_BJPE: Tensor, value_BJPE: Tensor, *, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Return softmax attention (B, H, T, E) and its log-sum-exp (B, H, T), fp32.

    `causal` takes as many queries as keys and lets each attend to its own place and those before it.
    """
    if query_BHTE.device.type == "cpu":  # this kernel shares key/value heads by itself
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query_BHTE, key_BJPE, value_BJPE, 0.0, causal, scale=scale
        )
        return out, lse
    heads, shared = query_BHTE.shape[1], key_BJPE.shape[1]
    if heads == shared:
        return _attend_cuda(query_BHTE, key_BJPE, value_BJPE, scale, causal)
    repeats = heads // shared
    if causal:
        key, value = (one.repeat_interleave(repeats, dim=1) for one in (key_BJPE, value_BJPE))
        return _attend_cuda(query_BHTE, key, value, scale, causal)
    # Without a mask, queries that share keys are so many more queries; nothing has to be repeated.
    batch, _, length, width = query_BHTE.shape
    out, lse = _attend_cuda(
        query_BHTE.reshape(batch, shared, repeats * length, width), key_BJPE, value_BJPE, scale, causal
    )
    return out.reshape(batch, heads, length, width), lse.reshape(batch, heads, length)


def merge(out_XE: Tensor, lse_X: Tensor, other_XE: Tensor, other_lse_X: Tensor) -> Tensor:
    """Return the attention over the union of two disjoint sets of keys, in fp32, as (..., E) of the inputs' dtype."""
    both_X = torch.logaddexp(lse_X, other_lse_X)
    merged = out_XE * (lse_X - both_X).exp()[..., None] + other_XE * (other_lse_X - both_X).exp()[..., None]
    return merged.to(out_XE.dtype)


def _attend_cuda(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    if query.dtype in _FLASH_DTYPES and query.shape[-1] % _FLASH_MULTIPLE == 0:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
        return out, lse
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, causal, scale=scale
    )
    return out, lse[..., : query.shape[2]]  # this kernel pads to a multiple of 32
