"""Attention backends behind one function, chosen by name or by device. All give equal results where they overlap.

    math    explicit softmax; the only one that computes tangents (`attend_dual`); the default for training on the CPU,
            where a training step is 1.4 times faster than with SDPA, for rows of 64 to 400 positions; beyond LONG
            positions SDPA trains 1.4 to 1.9 times faster (one layer, forward and backward), in less memory
    sdpa    torch's scaled_dot_product_attention with a dense mask; the default for inference: lengths change with
            every reply, and compiled flex would compile again for each
    flex    FlexAttention with a block mask; the default for training on CUDA (its backward exists there only)
    flash   the flash-attn package on CUDA: packed streams as segments of variable length (nn.attention.flash)

Legend: R batch rows, H query heads, G key heads (H a multiple of G), Q queries, K keys, D head width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.nn.attention.flash import available, flash_context, flash_copies
from omni.nn.tangent import Dual
from omni.sequence.mask import Fields, dense, flex

Backend = Literal["math", "sdpa", "flex", "flash"]
BACKENDS = get_args(Backend)
LONG = 1000  # keys
_log = logging.getLogger("omni")


@dataclass
class AttentionMask:
    """The visibility of one (queries, keys) pair, computed on demand in each form and cached for all layers of a
    pass. window: see sequence.mask."""

    queries: Fields
    keys: Fields
    window: int | None = None
    _lowered: dict[object, object] = field(default_factory=dict)

    def boolean(self) -> Tensor:
        """(R, 1, Q, K) bool."""
        if "boolean" not in self._lowered:
            self._lowered["boolean"] = dense(self.queries, self.keys, self.window).unsqueeze(1)
        return self._lowered["boolean"]  # type: ignore[return-value]

    def additive(self, dtype: torch.dtype) -> Tensor:
        """(R, 1, Q, K): 0 where visible, -inf where not."""
        if dtype not in self._lowered:
            mask = self.boolean()
            self._lowered[dtype] = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
                ~mask, -math.inf
            )
        return self._lowered[dtype]  # type: ignore[return-value]

    def cached(self, name: object, make: Callable[[], Any]) -> Any:
        """The value of `make`, stored under `name` until the pass ends."""
        if name not in self._lowered:
            self._lowered[name] = make()
        return self._lowered[name]

    def prepare(self, backend: str, dtype: torch.dtype) -> None:
        """Compute the backend's form of the mask before the layers: inside compiled layers, the first would trace
        apart."""
        if backend == "flex":
            self.block_mask()
        elif backend in ("math", "sdpa"):
            self.additive(dtype)

    def block_mask(self) -> object:
        """FlexAttention's block mask."""
        if "flex" not in self._lowered:
            self._lowered["flex"] = flex(self.queries, self.keys, self.window)
        return self._lowered["flex"]


@cache
def choose_backend(name: str | None, device_type: str, training: bool = False, is_long: bool = False) -> str:
    """`name` if given, else the default for the device. The log records the choice once."""
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"unknown attention backend {name!r}; known: {', '.join(BACKENDS)}")
        if name == "flash" and not available(device_type):
            raise ValueError(
                "attention backend 'flash' needs CUDA and flash-attn: pip install 'omni-flow[gpu]', or use 'sdpa'"
            )
        return name
    short = "math" if not is_long else "sdpa"
    chosen = ("flex" if device_type == "cuda" else short) if training else "sdpa"
    _log.info("attention backend: %s (device %s, %s)", chosen, device_type, "training" if training else "inference")
    return chosen


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, backend: str, cap: float | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v.

    Args:
        q: (R, H, Q, D). k, v: (R, G, K, D), of q's dtype.
        mask: None: every query sees every key.
        backend: one of BACKENDS.
        cap: c; the scores are c tanh(s / c) before the mask. SDPA has none: the explicit softmax computes it.

    Returns: (R, H, Q, D).
    """
    if backend == "math" or (backend == "sdpa" and cap is not None):
        return _math(q, k, v, mask, cap)
    if backend == "sdpa":
        bias = None if mask is None else mask.additive(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1])
    if backend == "flex":
        return _flex(q, k, v, mask, cap)
    if backend == "flash":
        if mask is None or q.shape[2] == k.shape[2]:
            return flash_context(q, k, v, mask, window=None if mask is None else mask.window, cap=cap)
        return flash_copies(q, k, v, mask, window=mask.window, cap=cap)
    raise ValueError(f"unknown attention backend {backend!r}; known: {', '.join(BACKENDS)}")


def capped(scores: Tensor, cap: float) -> Tensor:
    """c tanh(s / c) of scores (Gemma 2, arXiv 2408.00118)."""
    return (scores / cap).tanh() * cap


def _math(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, cap: float | None = None) -> Tensor:
    """Explicit softmax. Golden losses depend on its order of operations."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    q = q / math.sqrt(q.shape[-1])
    if cap is not None:
        scores = capped(q @ k.transpose(-1, -2), cap)
        return (scores if mask is None else scores + mask.additive(scores.dtype)).softmax(-1) @ v
    if mask is None:
        scores = q @ k.transpose(-1, -2)
    else:
        R, H, Q, K = *q.shape[:3], k.shape[2]
        bias = mask.additive(q.dtype).expand(R, H, Q, K).reshape(R * H, Q, K)
        scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(-1, -2)).unflatten(0, (R, H))
    return scores.softmax(-1) @ v


def attend_dual(
    q: Dual, k: Dual, v: Dual, k_memory: Tensor, v_memory: Tensor, mask: AttentionMask | None, cap: float | None = None
) -> Dual:
    """`attend` with its tangent, by explicit softmax, over constant keys and values followed by the queries' own.

    With P = softmax(S), O = P V:  O' = (P * S') V - rowsum(P * S') O + P V'. For the memory, S' is q' k^T / sqrt(D) and
    V' is 0. Where the mask hides a pair, P = 0 and the tangent is 0.

    Args:
        q: (R, H, Q, D). k, v: (R, G, Q, D). k_memory, v_memory: (R, G, M, D). mask: (Q, M + Q); None: all visible.
    """
    M, groups = k_memory.shape[2], q.value.shape[1] // k.value.shape[1]
    keys = torch.cat([k_memory.to(k.value.dtype), k.value], 2)
    values = torch.cat([v_memory.to(v.value.dtype), v.value], 2)
    dk, dv = k.tangent, v.tangent
    if groups > 1:
        keys, values, dk, dv = (x.repeat_interleave(groups, 1) for x in (keys, values, dk, dv))
    scale = 1 / math.sqrt(keys.shape[-1])
    q = Dual(q.value * scale, q.tangent * scale)
    scores = q.value @ keys.mT
    rate = q.tangent @ keys.mT
    rate = torch.cat([rate[..., :M], rate[..., M:] + q.value @ dk.mT], -1)
    if cap is not None:
        scores = capped(scores, cap)
        rate = rate * (1 - (scores / cap) ** 2)
    P = (scores if mask is None else scores + mask.additive(scores.dtype)).softmax(-1)
    moved, out = P * rate, P @ values
    return Dual(out, moved @ values - moved.sum(-1, keepdim=True) * out + P[..., M:] @ dv)


@cache
def _compiled_flex():  # noqa: ANN202
    """One compiled FlexAttention for all shapes."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@cache
def _score_cap(cap: float | None) -> Callable[..., Tensor] | None:
    """The soft cap as FlexAttention's score_mod."""
    if cap is None:
        return None
    return lambda score, b, h, i, j: capped(score, cap)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, cap: float | None = None) -> Tensor:
    """FlexAttention, compiled on CUDA. ValueError for gradients on the CPU, where it has no backward."""
    from torch.nn.attention.flex_attention import flex_attention

    if q.device.type == "cpu" and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("FlexAttention has no backward on the CPU; use attention backend 'sdpa' there")
    function = _compiled_flex() if q.device.type == "cuda" else flex_attention
    block_mask = None if mask is None else mask.block_mask()
    # The decoding kernel, used for short queries, has no tiles for some groups of heads (torch <= 2.13).
    kernel = {"FORCE_USE_FLEX_ATTENTION": True} if q.device.type == "cuda" else None
    gqa = q.shape[1] != k.shape[1]
    options = {"block_mask": block_mask, "enable_gqa": gqa, "kernel_options": kernel}
    return function(q, k, v, _score_cap(cap), **options)  # type: ignore[return-value]
