"""Attention with its forward-mode tangent, and gradients through both, for training through a tangent.

With a = 1 / sqrt(D), S = a q K^T (hidden pairs: -inf), P = softmax(S), and tangents dq, dK, dV of q, K, V:

    o  = P V
    do = (P * N) V + P dV       N = dS - mu,   dS = a (dq K^T + q dK^T),   mu_i = sum_j P_ij dS_ij

K = [context; own]. The context is constant: its keys and values have no tangent, and products with their tangents are
not computed. With cotangents g of o and h of do, the gradients are

    A = h V^T,  B = h dV^T + g V^T        s1 = sum_j P A = h.o,   s2 = sum_j P (A N + B) = h.do + g.o   (one per query)
    D' = P * (A - s1),  D = D' * N + P * (B - s2)
    dL/dq = a (D K + D' dK)   dL/dK = a (D^T q + D'^T dq)   dL/ddq = a D' K   dL/ddK = a D'^T q
    dL/dV = (P * N)^T h + P^T g   dL/ddV = P^T h

Saved for the backward: the inputs, o, do, and per query the log-sum-exp and mu. Memory is linear in the length. In bf16
the rounding errors of o and do are saved too. Where keys and values have a large common part, s1 and s2 from rounded
outputs give dL/ddq an error of 14% (see the tests); with the rounding errors it is 0.17% in `streamed` and 0.23% in
`triton`, whose weights are bf16 too, and which corrects the sums for their rounding. One pass over the keys keeps
running sums. mu is the mean of dS so far; when it changes by c, the sum of P N V changes by -c times the sum of P V. So
N is centred from the first tile on, as bf16 operands require.

    math       explicit, plain operations: memory is quadratic; works under any transform and for derivatives of any
               order; the test oracle of the other two
    streamed   plain torch, tile by tile, on any device and head width: memory is linear
    triton     the same in Triton kernels, on CUDA: head widths 64 and 128, bfloat16 or float32

Domain: bfloat16 or float32 (all but triton: float64 too), one dtype and one device for all; sums in float32 or better.
Under autocast, float32 inputs are cast to its dtype, as in torch's own attention. Any lengths (triton: at least one,
and no masks with ranks). Visibility: an AttentionMask (only `math` expands it to length x length), a dense bool mask,
or None: all see all. A query that sees nothing gives zeros; tiles where nothing is visible are skipped. ValueError for:
other dtypes and mixed dtypes, tangents unlike their values in shape, and dropout (value and tangent would need one
mask); and in streamed and triton for calls under torch.func transforms or forward-mode duals (give the tangents as
arguments) and second derivatives.

Cost, in products of a tile, where attention has 2 forward and 5 backward: 6 and 24 for own keys, 4 and 16 for context.

Sources: training through the tangent, Terminal Velocity Matching (arXiv 2511.19797); streaming as in FlashAttention
(arXiv 2205.14135). The formulas are derivatives of softmax attention, checked against autograd in float64.

Legend: R batch rows, H query heads, G key heads (H a multiple of G), Q queries, S own keys, T context keys, D head
width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from omni.nn.attention import jvp_streamed
from omni.nn.attention.backends import AttentionMask
from omni.nn.attention.jvp_inputs import Inputs, Visibility, shape_of

BACKENDS = ("math", "streamed", "triton")


def attend_with_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    k_context: Tensor | None = None,
    v_context: Tensor | None = None,
    mask: AttentionMask | Tensor | None = None,
    backend: str = "streamed",
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """softmax(q K^T / sqrt(D)) V over K = [context; own], and its derivative along (dq, dk, dv).

    Args:
        q, dq: (R, H, Q, D). k, v, dk, dv: (R, G, S, D). k_context, v_context: (R, G, T, D), constants; or None.
        mask: visibility between the Q queries and the T + S keys: an AttentionMask, or (R, 1, Q, T + S) bool, True
            where visible. None: every query sees every key.
        backend: one of BACKENDS; the module docstring has their domains.

    Returns: (o, do), each (R, H, Q, D) in q's dtype. Both have gradients in all eight tensors.
    Raises ValueError outside the domain.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r} of attention with a tangent; known: {', '.join(BACKENDS)}")
    if dropout:
        raise ValueError(f"attention with a tangent has no dropout, got {dropout}; set it to 0")
    x = _check(Inputs(q, k, v, dq, dk, dv, k_context, v_context))
    seen = Visibility.of(x, mask)
    with torch.autocast(q.device.type, enabled=False):
        if backend == "math":
            return _math(x, seen)
        _refuse_transforms(x, backend)
        return _Attention.apply(_implementation(backend, x), seen, *x)  # type: ignore[return-value]


# ---- the domain ------------------------------------------------------------------------------------------------------


def _check(x: Inputs) -> Inputs:
    """The inputs in one dtype. ValueError if shapes, dtypes or devices do not fit."""
    if (x.k_context is None) != (x.v_context is None):
        raise ValueError("give both k_context and v_context, or neither")
    if x.q.ndim != 4 or x.k.ndim != 4:
        raise ValueError(f"q (R, H, Q, D) and k (R, G, S, D) have four axes, got {shape_of(x.q)} and {shape_of(x.k)}")
    R, H, Q, D = x.q.shape
    G, S = x.k.shape[1:3]
    T = 0 if x.k_context is None else x.k_context.shape[2]
    if G == 0 or H % G:
        raise ValueError(f"{H} query heads are not a multiple of {G} key heads")
    wanted = {"q": (R, H, Q, D), "k": (R, G, S, D), "v": (R, G, S, D), "context": (R, G, T, D)}
    for name, value in x._asdict().items():
        shape = wanted["context" if "context" in name else name.removeprefix("d")]
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name} is {shape_of(value)}, but q and k need {shape}; a tangent has its value's shape")
        if value is not None and value.device != x.q.device:
            raise ValueError(f"{name} is on {value.device} and q on {x.q.device}; move all to one device")
    if torch.is_autocast_enabled(x.q.device.type):
        dtype = torch.get_autocast_dtype(x.q.device.type)
        x = x.each(lambda t: t.to(dtype) if t.dtype == torch.float32 else t)
    if x.q.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"attention with a tangent takes bfloat16, float32 or float64, got {x.q.dtype}; convert first")
    for name, value in x._asdict().items():
        if value is not None and value.dtype != x.q.dtype:
            raise ValueError(f"{name} is {value.dtype} and q {x.q.dtype}; convert all inputs and tangents to one dtype")
    return x


def _refuse_transforms(x: Inputs, backend: str) -> None:
    """ValueError under torch.func transforms and forward-mode duals: their derivatives would be lost."""
    for name, value in x._asdict().items():
        if value is None:
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(value):  # type: ignore[attr-defined]
            raise ValueError(
                f"{name} is inside a torch.func transform, which backend {backend!r} does not support: give tangents "
                "as arguments, outside of the transform, or use backend 'math'"
            )
        if torch.autograd.forward_ad.unpack_dual(value).tangent is not None:
            raise ValueError(
                f"{name} carries a forward-mode tangent, which backend {backend!r} would lose: give it as an argument, "
                "or use backend 'math' for second derivatives"
            )


# ---- math, and the streaming forms under autograd ------------------------------------------------------------------


def _math(x: Inputs, seen: Visibility) -> tuple[Tensor, Tensor]:
    """The formulas of the module docstring, on whole matrices; autograd differentiates them."""
    dtype = x.q.dtype
    work = torch.promote_types(dtype, torch.float32)
    q, k, v, dq, dk, dv = (t.to(work) for t in x[:6])
    if x.k_context is not None and x.v_context is not None:
        zeros = torch.zeros_like(x.k_context, dtype=work)
        k, v = torch.cat([x.k_context.to(work), k], 2), torch.cat([x.v_context.to(work), v], 2)
        dk, dv = torch.cat([zeros, dk], 2), torch.cat([zeros, dv], 2)
    k, v, dk, dv = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v, dk, dv))
    a = 1 / math.sqrt(q.shape[-1])
    s = a * q @ k.mT
    ds = a * (dq @ k.mT + q @ dk.mT)
    hidden = seen.part(slice(None), slice(None))
    if hidden is not None:
        hidden = ~hidden.unsqueeze(1)
        s = s.masked_fill(hidden, torch.finfo(work).min)
    p = s.softmax(-1)
    if hidden is not None:
        p = p.masked_fill(hidden, 0)  # a query that sees nothing gives zeros
    n = ds - (p * ds).sum(-1, keepdim=True)
    return (p @ v).to(dtype), ((p * n) @ v + p @ dv).to(dtype)


def _implementation(backend: str, x: Inputs) -> ModuleType:
    """A module with `forward` and `backward`. ValueError outside its domain."""
    if backend == "streamed":
        return jvp_streamed
    from omni.nn.attention import jvp_launch

    jvp_launch.check(x)
    return jvp_launch


class _Attention(torch.autograd.Function):
    """The two streaming forms as one autograd function; gradients in all eight tensors."""

    @staticmethod
    def forward(ctx: Any, module: ModuleType, seen: Visibility, *inputs: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        outputs, kept = module.forward(Inputs(*inputs), seen)
        ctx.module, ctx.seen = module, seen
        mask = seen.mask if isinstance(seen.mask, Tensor) else None  # saved so that autograd detects a change in place
        ctx.save_for_backward(mask, *inputs, *outputs, *kept)
        return outputs

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise ValueError(
                "attention with a tangent has no second derivative (create_graph=True); use backend 'math'"
            )
        _, *saved = ctx.saved_tensors
        inputs, outputs, kept = Inputs(*saved[:8]), saved[8:10], saved[10:]
        needed: Sequence[bool] = ctx.needs_input_grad[2:]
        with torch.autocast(g.device.type, enabled=False):
            gradients = ctx.module.backward(inputs, ctx.seen, outputs, kept, g, h, needed)
        return None, None, *(gradient if need else None for gradient, need in zip(gradients, needed, strict=True))
