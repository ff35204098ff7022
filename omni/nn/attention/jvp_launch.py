"""Launches of the Triton kernels of attention with its tangent: the domain, lists of visible tiles, tile sizes.

Legend: R batch rows, H query heads, G key heads, Q queries, S own keys, T context keys, D head width.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni.nn.attention import jvp_triton as kernels
from omni.nn.attention.jvp_inputs import Inputs, Visibility

HEAD_WIDTHS = (64, 128)
MAX_PROGRAMS = 65535  # batch rows times heads: the second axis of a CUDA grid
LONGEST_TILE = 128  # positions; no tiling below has more


class Tiling(NamedTuple):
    """Tile sizes (queries, keys), warps per program and pipeline stages."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


class Tilings(NamedTuple):
    """The tiles of the kernels. On Hopper four warps multiply 64 rows of the resident side (queries; for grad_k and
    grad_v keys) at a time. Fewer rows do not use its fast instruction; more warps compute the same twice."""

    forward: Tiling
    grad_q: Tiling
    grad_k: Tiling
    grad_v: Tiling


# By head width and element size in bytes. In bf16 on compute capability 9.0, all use wgmma, spill little or nothing in
# their loops, and need at most 225 KiB of shared memory.
# `python -m eval eval/suites/jvp_attention.toml jvp_attention.sweep=true` measures these and other tiles.
HOPPER = {
    (64, 2): Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 3), Tiling(64, 128, 8, 2), Tiling(64, 128, 8, 3)),
    (128, 2): Tilings(Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 3), Tiling(32, 128, 8, 3), Tiling(32, 128, 8, 3)),
    (64, 4): Tilings(Tiling(16, 32), Tiling(16, 32), Tiling(32, 16), Tiling(32, 16)),
    (128, 4): Tilings(*[Tiling(16, 16)] * 4),
}
# Compute capability 8.0 (163 KiB of shared memory per block); SMALL: 99 KiB, such as 8.6, 8.9 and 12.0.
AMPERE = HOPPER | {
    (64, 2): Tilings(*[Tiling(64, 32)] * 4),
    (128, 2): Tilings(Tiling(128, 32, 8), Tiling(128, 32, 8), Tiling(32, 128, 8), Tiling(32, 128, 8)),
}
SMALL = AMPERE | {(128, 2): Tilings(Tiling(128, 32, 8), Tiling(32, 32), Tiling(32, 32), Tiling(32, 32))}
ROW_SUMS = Tiling(32, 0)  # of the kernel row_sums, which visits no keys
BY_CAPABILITY = {(8, 0): AMPERE, (9, 0): HOPPER, (10, 0): HOPPER, (10, 3): HOPPER}  # all others: SMALL


def tilings(x: Tensor) -> Tilings:
    """The tiles for heads like x's on its device."""
    known = BY_CAPABILITY.get(torch.cuda.get_device_capability(x.device), SMALL) if x.is_cuda else SMALL
    return known[x.shape[3], x.element_size()]


def _interpreting() -> bool:
    """Whether Triton's interpreter is asked for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _element(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype."""
    return kernels.tl.bfloat16 if dtype == torch.bfloat16 else kernels.tl.float32


def check(x: Inputs) -> None:
    """ValueError outside the kernels' domain."""
    (R, H, Q, D), S, device = x.q.shape, x.k.shape[2], x.q.device
    if D not in HEAD_WIDTHS:
        raise ValueError(f"attention backend 'triton' has kernels for head widths 64 and 128, got {D}; use 'streamed'")
    if x.q.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"attention backend 'triton' takes bfloat16 or float32, got {x.q.dtype}; use 'streamed'")
    if 0 in (R, Q, S):
        raise ValueError(f"attention backend 'triton' got {R} rows of {Q} queries and {S} own keys; use 'streamed'")
    far = max(tensor.stride(2) for tensor in x if tensor is not None)
    if far * LONGEST_TILE >= 1 << 31:
        raise ValueError(f"positions {far} elements apart are too far for 32-bit offsets; make the inputs contiguous")
    if R * H > MAX_PROGRAMS:
        raise ValueError(f"{R} batch rows of {H} heads exceed {MAX_PROGRAMS} parallel programs; give fewer rows")
    if _interpreting():
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
    if _interpreting() != kernels.interpreted:
        raise ValueError("TRITON_INTERPRET changed after Triton was loaded; set it before the program starts")


class _Side:
    """The visibility of the context keys, or of the own keys: the mask, and for each tile the list of visible tiles."""

    def __init__(self, seen: Visibility, known: Tilings, keys: slice) -> None:
        self.seen, self.keys = seen, keys
        self.fine = min(t.queries for t in known), min(t.keys for t in known)  # all tiles are multiples of these

    def mask(self) -> tuple[Any, ...]:
        """The mask as arguments of the kernels (jvp_triton._visible reads them in this order); cached."""
        return self.seen.cached(("triton mask", self.keys.start, self.keys.stop), self._mask)

    def _mask(self) -> tuple[Any, ...]:
        """`mask` without the cache. ValueError for masks with ranks."""
        if self.seen.mask is None:
            return ()
        if isinstance(self.seen.mask, Tensor):
            part = self.seen.mask[:, 0, :, self.keys]
            part = (part if part.stride(2) == 1 else part.contiguous()).view(torch.uint8)
            return part, part.stride(0), part.stride(1)
        queries, keys = self.seen.fields(slice(None), self.keys)
        if queries.rank is not None or keys.rank is not None:
            raise ValueError("Triton attention has no ranks inside a copy; use tangents = 'streamed' for tokens")
        # A query of the same document sees a key if its limit is above the key's block, or if it is of the key's copy.
        limit, context, most = queries.block + (queries.copy == 0), keys.copy == 0, torch.iinfo(torch.int32)
        block, copy = keys.block.masked_fill(~context, most.max), keys.copy.masked_fill(context, most.min)
        parts = (queries.document, limit, queries.copy), (keys.document, block, copy)
        return tuple(torch.stack(part, 1).to(torch.int32) for part in parts)

    def lists(self, queries: int, keys: int, by_query: bool) -> tuple[Any, ...]:
        """For each tile of queries (or keys): the number of tiles of the other side with a visible pair, and their
        indices."""
        if self.seen.mask is None:
            return ()
        name = ("triton lists", self.keys.start, self.keys.stop, queries, keys, by_query)
        return self.seen.cached(name, lambda: self._lists(queries, keys, by_query))

    def _lists(self, queries: int, keys: int, by_query: bool) -> tuple[Any, ...]:
        """`lists` without the cache."""
        q, k = self.fine
        name = ("triton occupied", self.keys.start, self.keys.stop, q, k)
        fine = self.seen.cached(name, lambda: self.seen.occupied(self.keys, q, k))
        q, k = queries // q, keys // k
        fine = torch.nn.functional.pad(fine, (0, -fine.shape[2] % k, 0, -fine.shape[1] % q))
        occupied = fine.unflatten(2, (-1, k)).unflatten(1, (-1, q)).any(4).any(2)
        occupied = occupied if by_query else occupied.transpose(1, 2)
        order = occupied.to(torch.uint8).argsort(dim=2, descending=True, stable=True).to(torch.int32).contiguous()
        return occupied.sum(2, dtype=torch.int32).contiguous(), order, order.shape[1], order.shape[2]


def launch_kernel(kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Launch a kernel. Every launch calls this function, so that a measurement can replace it."""
    kernel[grid](*arguments, **options)


class _Launch:
    """The state shared by the kernels of one call: inputs with a dense last axis, tile lists, compile-time options."""

    def __init__(self, x: Inputs, seen: Visibility) -> None:
        self.x = x = x.each(_with_dense_last_axis)
        self.R, self.H, self.Q, self.D = x.q.shape
        self.G, self.S, self.T = x.k.shape[1], x.k.shape[2], seen.num_context
        self.tilings = tilings(x.q)
        self.own = _Side(seen, self.tilings, slice(self.T, seen.num_keys))
        self.context = _Side(seen, self.tilings, slice(0, self.T)) if self.T else None
        self.mask = kernels.DENSE if isinstance(seen.mask, Tensor) else kernels.FIELDS if seen.mask else kernels.NO_MASK
        self.scales = (1 / math.sqrt(self.D), math.log2(math.e) / math.sqrt(self.D))

    def run(self, kernel: Any, tiling: Tiling, grid: tuple[int, int], *arguments: Any, **options: Any) -> None:
        """Launch a kernel with the constants of all of them."""
        options |= {
            "D": self.D, "BQ": tiling.queries, "DTYPE": _element(self.x.q.dtype),
            "EMULATE": kernels.interpreted, "num_warps": tiling.warps, "num_stages": tiling.stages,
        }  # fmt: skip
        with torch.cuda.device(self.x.q.device) if self.x.q.is_cuda else contextlib.nullcontext():
            launch_kernel(kernel, grid, arguments, options)

    def options(self, tiling: Tiling, *num_keys: int) -> dict[str, Any]:
        """The mask kind, and whether tiles divide the lengths."""
        even = self.Q % tiling.queries == 0 and all(n % tiling.keys == 0 for n in num_keys)
        return {"MASK": self.mask, "EVEN": even, "BK": tiling.keys}

    def by_query(self, kernel: Any, tiling: Tiling, *arguments: Any) -> None:
        """Run a kernel with resident queries; `arguments` follow the inputs."""
        x, context = self.x, self.context or self.own
        far = (x.k_context, x.v_context) if self.T else (x.k, x.v)  # without a context, never read
        inputs = map(strided, (x.q, x.dq, x.k, x.dk, x.v, x.dv, *far))
        lists = (side.lists(tiling.queries, tiling.keys, True) for side in (self.own, context))
        self.run(
            kernel, tiling, (-(-self.Q // tiling.queries), self.R * self.H), *inputs, *arguments,
            self.own.mask(), context.mask(), *lists, self.Q, self.S, self.T, self.H, self.H // self.G, *self.scales,
            CONTEXT=self.context is not None, **self.options(tiling, self.S, self.T),
        )  # fmt: skip

    def by_key(
        self, kernel: Any, tiling: Tiling, keys: tuple[Tensor | None, ...], *arguments: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run a kernel with resident keys, on own keys (k, dk, v, dv) or the context's (k, None, v, None)."""
        k, dk, v, dv = keys
        assert k is not None and v is not None
        own = dk is not None and dv is not None
        side, num_keys = self.own if own else self.context, k.shape[2]
        out, dout = _empty_like(k), _empty_like(k) if own else None
        if side is None:  # a context of no keys
            return out, dout
        tangents = (dk, dv) if dk is not None and dv is not None else (k, v)  # the context's are never read
        inputs = map(strided, (self.x.q, self.x.dq, k, tangents[0], v, tangents[1]))
        outputs = strided(out), strided(out if dout is None else dout)
        self.run(
            kernel, tiling, (-(-num_keys // tiling.keys), self.R * self.G), *inputs, *arguments, *outputs,
            side.mask(), side.lists(tiling.queries, tiling.keys, False), self.Q, num_keys, self.G, *self.scales,
            OWN=own, GROUP=self.H // self.G, **self.options(tiling, num_keys),
        )  # fmt: skip
        return out, dout


def strided(x: Tensor | None) -> tuple[Any, ...]:
    """(pointer, strides of rows, heads and positions): the form in which kernels take a tensor of four axes."""
    assert x is not None and x.stride(3) == 1
    return x, x.stride(0), x.stride(1), x.stride(2)


def _with_dense_last_axis(x: Tensor) -> Tensor:
    """x, copied if its last axis is not contiguous."""
    return x if x.stride(3) == 1 else x.contiguous()


def _empty_like(x: Tensor) -> Tensor:
    """Uninitialised, of x's shape and dtype; the heads of a position are adjacent in memory."""
    R, H, N, D = x.shape
    return x.new_empty(R, N, H, D).transpose(1, 2)


def forward(x: Inputs, seen: Visibility) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """(o, do), and what the backward needs: the rounding errors in bf16, log-sum-exp (base 2) and mu (float32)."""
    call = _Launch(x, seen)
    o, do = _empty_like(x.q), _empty_like(x.q)
    low = (_empty_like(x.q), _empty_like(x.q)) if x.q.dtype == torch.bfloat16 else (None, None)
    lse, mu = (x.q.new_empty(x.q.shape[:3], dtype=torch.float32) for _ in range(2))
    call.by_query(kernels.forward, call.tilings.forward, *_outputs((o, do), low), lse, mu)
    return (o, do), (*low, lse, mu)


def _outputs(whole: tuple[Tensor, Tensor], low: tuple[Tensor | None, ...]) -> tuple[tuple[Any, ...], ...]:
    """Arguments for o, do and their rounding errors (in float32 the kernels do not touch the latter)."""
    return tuple(map(strided, (*whole, *(a if b is None else b for a, b in zip(whole, low, strict=True)))))


def _mean_keys(x: Inputs) -> Tensor:
    """(R, G, 2, D) float32: the mean key of [context; own], and the mean of the tangents, where the context's are
    zero."""
    total, tangent = (t.sum(2, dtype=torch.float32) for t in (x.k, x.dk))
    number = x.k.shape[2]
    if x.k_context is not None:
        total, number = total + x.k_context.sum(2, dtype=torch.float32), number + x.k_context.shape[2]
    return torch.stack([total, tangent], 2) / number


def backward(
    x: Inputs,
    seen: Visibility,
    outputs: tuple[Tensor, Tensor],
    kept: tuple[Any, ...],
    g: Tensor,
    h: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the eight inputs, in their dtypes, from the outputs of `forward` and the cotangents of o and do.

    A kernel whose results are not `needed` does not run.
    """
    call = _Launch(x, seen)
    x, known = call.x, call.tilings
    *low, lse, mu = kept
    cotangents = tuple(map(strided, (_with_dense_last_axis(g), _with_dense_last_axis(h))))
    s1, s2 = torch.empty_like(lse), torch.empty_like(lse)
    call.run(
        kernels.row_sums, ROW_SUMS, (-(-call.Q // ROW_SUMS.queries), call.R * call.H),
        *_outputs(outputs, tuple(low)), *cotangents, s1, s2, call.Q, call.H,
    )  # fmt: skip
    given = (*cotangents, lse, mu, s1, s2)
    need_q, need_k, need_v, need_dq, need_dk, need_dv, need_k_context, need_v_context = needed
    grads: list[Tensor | None] = [None] * 8
    if need_q or need_dq:
        grads[0], grads[3] = out = _empty_like(x.q), _empty_like(x.q)
        call.by_query(kernels.grad_q, known.grad_q, *given, _mean_keys(x), *map(strided, out))
    own, far = (x.k, x.dk, x.v, x.dv), (x.k_context, None, x.v_context, None)
    if need_k or need_dk:
        grads[1], grads[4] = call.by_key(kernels.grad_k, known.grad_k, own, *given)
    if need_v or need_dv:
        grads[2], grads[5] = call.by_key(kernels.grad_v, known.grad_v, own, *given)
    if need_k_context:
        grads[6], _ = call.by_key(kernels.grad_k, known.grad_k, far, *given)
    if need_v_context:
        grads[7], _ = call.by_key(kernels.grad_v, known.grad_v, far, *given)
    return grads
