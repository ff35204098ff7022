"""`flash_attn_varlen_func` in plain torch: the published signature and arguments (flash-attn 2.7 and 2.8), explicit
softmax in the dtype of the inputs, on any device. It refuses what the kernel refuses, and what the project never uses.

Sequence i has queries cu_seqlens_q[i] to cu_seqlens_q[i + 1], and keys alike. The causal mask is aligned to the last
key: query a of n sees the keys up to b = a + m - n of m; with window (left, right) those from b - left to b + right. A
query without a key gives 0.

Legend: H query heads, G key heads, n queries and m keys of one sequence, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    dtypes: tuple[torch.dtype, ...] = HALF,
) -> Tensor:
    """q: (queries, H, D). k, v: (keys, G, D). Returns (queries, H, D). dtypes: those allowed (not of the kernel)."""
    if dropout_p or alibi_slopes is not None or return_attn_probs or block_table is not None:
        raise NotImplementedError("dropout, slopes, probabilities and paged keys have no stand-in")
    _require_tensors(q, k, v, dtypes)
    for bounds, longest, total in ((cu_seqlens_q, max_seqlen_q, len(q)), (cu_seqlens_k, max_seqlen_k, len(k))):
        _require_bounds(bounds, longest, total)
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise RuntimeError("cu_seqlens_k must have shape (batch_size + 1)")
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    queries, keys, values = (part.split(bounds.diff().tolist()) for part, bounds in (
        (q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k)))  # fmt: skip
    window = (window_size[0], 0) if causal else window_size
    parts = zip(queries, keys, values, strict=True)
    return torch.cat([_sequence(*part, scale, softcap, window) for part in parts])


def _sequence(q: Tensor, k: Tensor, v: Tensor, scale: float, cap: float, window: tuple[int, int]) -> Tensor:
    """(n, H, D), (m, G, D), (m, G, D) -> (n, H, D)."""
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) * scale
    if cap:
        scores = cap * (scores / cap).tanh()
    behind = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))  # how far the key is behind
    seen = torch.ones_like(behind, dtype=torch.bool)
    for side, distance in zip(window, (behind, -behind), strict=True):
        seen &= (distance <= side) if side >= 0 else True
    seen = seen.to(q.device)
    weights = torch.where(seen, scores.masked_fill(~seen, -1e300 if q.dtype == torch.float64 else -1e4).softmax(-1), 0)
    return torch.einsum("hnm,mhd->nhd", weights, v)


def _require_tensors(q: Tensor, k: Tensor, v: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if {q.dtype, k.dtype, v.dtype} - set(dtypes) or not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if any(part.stride(-1) != 1 for part in (q, k, v)):
        raise RuntimeError("Input tensor must have contiguous last dimension")
    if q.shape[-1] > 256:
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256")
    if q.shape[1] % k.shape[1] or k.shape != v.shape or k.shape[2] != q.shape[2]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")


def _require_bounds(bounds: Tensor, longest: int, total: int) -> None:
    """The kernel trusts them: with wrong ones it reads outside of its inputs, or leaves rows out."""
    if bounds.dtype != torch.int32 or not bounds.is_contiguous():
        raise RuntimeError("cu_seqlens must have dtype int32 and be contiguous")
    lengths = bounds.diff()
    if len(lengths) < 1 or int(bounds[0]) != 0 or int(bounds[-1]) != total or int(lengths.min()) < 0:
        raise RuntimeError(f"cu_seqlens {bounds.tolist()} do not divide {total} positions")
    if type(longest) is not int or longest != int(lengths.max()):
        raise RuntimeError(f"max_seqlen {longest!r} is not the longest of {lengths.tolist()}")


class StandIn:
    """The function with float64 allowed. `calls`: (queries, keys, causal) of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, bool]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **options: Any) -> Tensor:
        self.calls.append((len(q), len(k), options["causal"]))
        function: Callable[..., Tensor] = flash_attn_varlen_func
        return function(q, k, v, *arguments, **options, dtypes=(*HALF, torch.float64))
