"""Launches of the Triton kernels of attention with its tangent: the domain, lists of visible tiles, tile sizes.

Legend: R rows, H query heads, G key heads, Q queries, S own keys, T context keys, D head width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from omni.nn import jvp_attention_triton as kernels

if TYPE_CHECKING:
    from omni.nn.jvp_attention import Inputs, Visibility

HEAD_WIDTHS = (64, 128)
MAX_PROGRAMS = 65535  # of rows and heads: the second axis of a CUDA grid


class Tiling(NamedTuple):
    """Sizes of tiles (queries, keys), and the launch: warps of a program, stages of its pipeline."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


# By head width and bytes of an element. In bf16, compiled for compute capability 9.0, they spill few registers or none
# and need at most 134 KiB of shared memory. Not tuned by time: `python -m eval` has the task `jvp_attention` for that.
TILINGS = {
    (64, 2): Tiling(64, 32),
    (128, 2): Tiling(64, 32, 8),
    (64, 4): Tiling(32, 32, 8),
    (128, 4): Tiling(32, 16, 8),
}
# Where a block has less shared memory than that (such as compute capability 8.6 and 8.9): at most 70 KiB.
LARGE_SHARED_MEMORY = 140 * 1024
SMALL_TILINGS = {**TILINGS, (128, 2): Tiling(32, 32)}


def tiling(x: Tensor) -> Tiling:
    """The tiles for heads like x's on its device."""
    known = TILINGS
    if x.is_cuda:
        shared = getattr(torch.cuda.get_device_properties(x.device), "shared_memory_per_block_optin", 0)
        known = TILINGS if shared >= LARGE_SHARED_MEMORY else SMALL_TILINGS
    return known[x.shape[3], x.element_size()]


def check(x: Inputs) -> None:
    """Raises ValueError outside the kernels' domain."""
    (R, H, Q, D), S, device = x.q.shape, x.k.shape[2], x.q.device
    if D not in HEAD_WIDTHS:
        raise ValueError(f"attention backend 'triton' has kernels for head widths 64 and 128, got {D}; use 'streamed'")
    if x.q.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"attention backend 'triton' takes bfloat16 or float32, got {x.q.dtype}; use 'streamed'")
    if 0 in (R, Q, S):
        raise ValueError(f"attention backend 'triton' got {R} rows of {Q} queries and {S} own keys; use 'streamed'")
    if R * H > MAX_PROGRAMS:
        raise ValueError(f"{R} rows of {H} heads exceed {MAX_PROGRAMS} programs abreast; give fewer rows in a call")
    if kernels.interpreting():
        if device.type != "cpu":
            raise ValueError(f"Triton's interpreter (TRITON_INTERPRET=1) needs CPU tensors here, got {device}")
    elif device.type != "cuda":
        raise ValueError(f"attention backend 'triton' needs CUDA tensors, got {device}; use 'streamed' there")
    elif torch.cuda.get_device_capability(device) < (8, 0):
        have = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ValueError(
            f"attention backend 'triton' needs compute capability 8.0, {device} has {have}; use 'streamed'"
        )
    kernels.load()
    if kernels.interpreting() != kernels.interpreted:
        raise ValueError("TRITON_INTERPRET was changed after Triton was loaded; set it before the program starts")


class _Lists(NamedTuple):
    """For each tile, the tiles of the other side with anything visible: count (R, n), numbers (R, n, m), int32."""

    count: Tensor
    numbers: Tensor

    @staticmethod
    def of(occupied: Tensor) -> _Lists:
        order = occupied.to(torch.uint8).argsort(dim=2, descending=True, stable=True)
        return _Lists(occupied.sum(2, dtype=torch.int32).contiguous(), order.to(torch.int32).contiguous())

    def arguments(self) -> tuple[Any, ...]:
        return self.count, self.numbers, self.numbers.shape[1], self.numbers.shape[2]


class _Side(NamedTuple):
    """The visibility of the context's or the own keys: the mask, and lists by tile of queries and by tile of keys."""

    mask: tuple[Any, ...]
    by_query: _Lists
    by_key: _Lists


def _side(seen: Visibility, tile: Tiling, keys: slice) -> _Side:
    def make() -> _Side:
        occupied = seen.occupied(keys, tile.queries, tile.keys)
        if seen.mask is None:
            mask: tuple[Any, ...] = ()
        elif isinstance(seen.mask, Tensor):
            part = seen.mask[:, 0, :, keys]
            part = (part if part.stride(2) == 1 else part.contiguous()).view(torch.uint8)
            mask = (part, part.stride(0), part.stride(1))
        else:
            both = seen.fields(slice(None), keys)
            if any(fields.rank is not None for fields in both):
                raise ValueError("Triton attention knows no order inside a copy; use tangents = 'streamed' for tokens")
            mask = tuple(torch.stack([f.document, f.block, f.copy], 1).to(torch.int32) for f in both)
        return _Side(mask, _Lists.of(occupied), _Lists.of(occupied.transpose(1, 2)))

    return seen.kept(("triton", keys.start, keys.stop, tile.queries, tile.keys), make)


class _Launch:
    """What the kernels of one call share: inputs with a dense last axis, lists of tiles, compile-time options."""

    def __init__(self, x: Inputs, seen: Visibility) -> None:
        self.x = x = x.each(_dense)
        self.R, self.H, self.Q, self.D = x.q.shape
        self.G, self.S, self.T = x.k.shape[1], x.k.shape[2], seen.num_context
        self.tiling = tiling(x.q)
        self.own = _side(seen, self.tiling, slice(self.T, seen.num_keys))
        self.context = _side(seen, self.tiling, slice(0, self.T)) if self.T else None
        self.mask = kernels.DENSE if isinstance(seen.mask, Tensor) else kernels.FIELDS if seen.mask else kernels.NO_MASK
        self.scales = (1 / math.sqrt(self.D), math.log2(math.e) / math.sqrt(self.D))

    def run(self, kernel: Any, tiles: int, heads: int, *arguments: Any, **options: Any) -> None:
        grid = (tiles, self.R * heads)
        options |= {
            "D": self.D, "BQ": self.tiling.queries, "DTYPE": kernels.element(self.x.q.dtype),
            "EMULATE": kernels.interpreted,
            "num_warps": self.tiling.warps, "num_stages": self.tiling.stages,
        }  # fmt: skip
        with torch.cuda.device(self.x.q.device) if self.x.q.is_cuda else contextlib.nullcontext():
            kernel[grid](*arguments, **options)

    @property
    def tiles_q(self) -> int:
        return -(-self.Q // self.tiling.queries)

    def tiles_k(self, num_keys: int) -> int:
        return -(-num_keys // self.tiling.keys)

    def options(self) -> dict[str, Any]:
        return {"MASK": self.mask, "BK": self.tiling.keys}

    def by_query(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Arguments of a kernel whose queries are resident: keys and values, and what it must know of them."""
        x, context = self.x, self.context or self.own
        far = (x.k, x.v) if x.k_context is None or x.v_context is None else (x.k_context, x.v_context)
        keys = tuple(map(strided, (x.q, x.dq, x.k, x.dk, x.v, x.dv, *far)))
        visible = (self.own.mask, context.mask, self.own.by_query.arguments(), context.by_query.arguments())
        return keys, (*visible, self.Q, self.S, self.T, self.H, self.H // self.G, *self.scales)


def strided(x: Tensor) -> tuple[Any, ...]:
    """(pointer, strides of rows, heads and positions), as the kernels take a tensor of four axes."""
    assert x.stride(3) == 1
    return x, x.stride(0), x.stride(1), x.stride(2)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """Uninitialised, of x's shape and dtype; in memory a position's heads follow one another."""
    R, H, N, D = x.shape
    return x.new_empty(R, N, H, D).transpose(1, 2)


def forward(x: Inputs, seen: Visibility) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """(o, do), and what the backward needs: what rounding them to bf16 lost, log-sum-exp (base 2) and mu (float32)."""
    call = _Launch(x, seen)
    keys, rest = call.by_query()
    o, do = _like(x.q), _like(x.q)
    low = (_like(x.q), _like(x.q)) if x.q.dtype == torch.bfloat16 else (None, None)
    lse, mu = (x.q.new_empty(x.q.shape[:3], dtype=torch.float32) for _ in range(2))
    call.run(
        kernels.forward, call.tiles_q, call.H, *keys, *_outputs((o, do), low), lse, mu, *rest,
        CONTEXT=call.context is not None, **call.options(),
    )  # fmt: skip
    return (o, do), (*low, lse, mu)


def _outputs(whole: tuple[Tensor, Tensor], low: tuple[Tensor | None, ...]) -> tuple[tuple[Any, ...], ...]:
    """Arguments for o, do and what their rounding lost (the kernels leave those of float32 alone)."""
    return tuple(map(strided, (*whole, *(a if b is None else b for a, b in zip(whole, low, strict=True)))))


def backward(
    x: Inputs,
    seen: Visibility,
    outputs: tuple[Tensor, Tensor],
    kept: tuple[Any, ...],
    g: Tensor,
    h: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the eight inputs, in their dtypes, given what `forward` returned and the cotangents of o and do.

    Kernels whose results are not `needed` do not run.
    """
    call = _Launch(x, seen)
    x = call.x
    keys, rest = call.by_query()
    *low, lse, mu = kept
    cotangents = tuple(map(strided, (_dense(g), _dense(h))))
    s1, s2 = torch.empty_like(lse), torch.empty_like(lse)
    rows = (*_outputs(outputs, tuple(low)), *cotangents, s1, s2, call.Q, call.H)
    call.run(kernels.row_sums, call.tiles_q, call.H, *rows)
    need_q, need_k, need_v, need_dq, need_dk, need_dv, need_k_context, need_v_context = needed
    grads: list[Tensor | None] = [None] * 8
    if need_q or need_dq:
        grads[0], grads[3] = _like(x.q), _like(x.q)
        call.run(
            kernels.grad_q, call.tiles_q, call.H, *keys, *cotangents, lse, mu, s1, s2,
            strided(grads[0]), strided(grads[3]), *rest, CONTEXT=call.context is not None, **call.options(),
        )  # fmt: skip
    statistics = (lse, mu, s1, s2)
    if need_k or need_dk:
        grads[1], grads[4] = _by_key(call, kernels.grad_k, (x.k, x.dk, x.v, x.dv), cotangents, statistics)
    if need_v or need_dv:
        grads[2], grads[5] = _by_key(call, kernels.grad_v, (x.k, x.dk, x.v, x.dv), cotangents, statistics)
    far = (x.k_context, None, x.v_context, None)
    if need_k_context:
        grads[6], _ = _by_key(call, kernels.grad_k, far, cotangents, statistics)
    if need_v_context:
        grads[7], _ = _by_key(call, kernels.grad_v, far, cotangents, statistics)
    return grads


def _by_key(
    call: _Launch,
    kernel: Any,
    keys: tuple[Tensor | None, ...],
    cotangents: tuple[Any, ...],
    statistics: tuple[Any, ...],
) -> tuple[Tensor, Tensor | None]:
    """A kernel whose keys are resident, on own keys (k, dk, v, dv) or the context's (k, None, v, None)."""
    k, dk, v, dv = keys
    assert k is not None and v is not None
    own = dk is not None and dv is not None
    side = call.own if own else call.context
    out, dout = _like(k), _like(k) if own else None
    tangents = (dk, dv) if dk is not None and dv is not None else (k, v)  # the context's are never read
    if side is None:  # a context of no keys
        return out, dout
    tensors = (call.x.q, call.x.dq, k, tangents[0], v, tangents[1])
    call.run(
        kernel, call.tiles_k(k.shape[2]), call.G, *map(strided, tensors), *cotangents, *statistics,
        strided(out), strided(out if dout is None else dout), side.mask, side.by_key.arguments(),
        call.Q, k.shape[2], call.G, call.H // call.G, *call.scales, OWN=own, **call.options(),
    )  # fmt: skip
    return out, dout
