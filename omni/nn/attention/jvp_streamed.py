"""Attention with its tangent, tile by tile in plain torch. Formulas and domain: see jvp.py.

Memory is linear in the length: one tile of scores exists at a time, forward and backward. A Python loop visits the
tiles. This form serves CPUs, other head widths and float64; on CUDA the Triton kernels are faster.

Legend: R batch rows, G key heads, M query heads to each, Q queries, S own keys, T context keys, D head width; a tile
has n queries and b keys, and its scores are (R, G, M n, b).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni.nn.attention.jvp_inputs import Inputs, Visibility

TILE = 128


class _Side(NamedTuple):
    """Keys and values of the context, or of the copy itself; only the latter have tangents. `at`: their first
    position."""

    k: Tensor
    v: Tensor
    dk: Tensor | None
    dv: Tensor | None
    at: int
    tiles: list[list[int]]  # for each tile of queries, the tiles of keys that any batch row sees


def _sides(x: Inputs, seen: Visibility, work: torch.dtype) -> list[_Side]:
    """The context, if any, then the own keys: the order in which tiles are visited."""

    def tiles(keys: slice) -> list[list[int]]:
        occupied = seen.cached(
            ("streamed", keys.start, keys.stop, TILE), lambda: seen.occupied(keys, TILE, TILE).any(0).tolist()
        )
        return [[j for j, some in enumerate(row) if some] for row in occupied]

    T = seen.num_context
    own = _Side(*(t.to(work) for t in (x.k, x.v, x.dk, x.dv)), at=T, tiles=tiles(slice(T, seen.num_keys)))
    if x.k_context is None or x.v_context is None:
        return [own]
    return [_Side(x.k_context.to(work), x.v_context.to(work), None, None, 0, tiles(slice(0, T))), own]


def _walk(
    sides: list[_Side], seen: Visibility, q: Tensor, dq: Tensor, number: int, rows: slice, groups: int
) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """The tiles of keys that a tile of queries sees: (side, keys of that side, S, dS). Hidden pairs have S = -inf."""
    for index, side in enumerate(sides):
        for j in side.tiles[number]:
            keys = slice(j * TILE, min((j + 1) * TILE, side.k.shape[2]))
            kt = side.k[:, :, keys].mT
            s, ds = q @ kt, dq @ kt
            if side.dk is not None:
                ds += q @ side.dk[:, :, keys].mT
            part = seen.part(rows, slice(side.at + keys.start, side.at + keys.stop))
            if part is not None:
                s = s.unflatten(2, (groups, -1)).masked_fill_(~part[:, None, None], -math.inf).flatten(2, 3)
            yield index, keys, s, ds


class _Heads(NamedTuple):
    """Cuts tensors of queries (R, G M, Q, X) into tiles (R, G, M n, X); heads that share a key are adjacent."""

    G: int
    work: torch.dtype

    def tile(self, x: Tensor, rows: slice) -> Tensor:
        """The queries `rows` of x, in the working dtype."""
        return x[:, :, rows].to(self.work).unflatten(1, (self.G, -1)).flatten(2, 3)

    def untile(self, x: Tensor, into: Tensor, rows: slice) -> None:
        """Inverse of `tile`, written into the queries `rows` of `into`."""
        groups = into.shape[1] // self.G
        into[:, :, rows] = x.unflatten(2, (groups, -1)).flatten(1, 2).to(into.dtype)


def _rows(count: int) -> Iterator[tuple[int, slice]]:
    """(number, queries) of each tile of queries."""
    yield from ((i, slice(start, min(start + TILE, count))) for i, start in enumerate(range(0, count, TILE)))


def forward(x: Inputs, seen: Visibility) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """(o, do), and what the backward needs: their rounding errors, log-sum-exp and mu in float32 or better."""
    work = torch.promote_types(x.q.dtype, torch.float32)
    R, H, Q, D = x.q.shape
    heads, groups = _Heads(x.k.shape[1], work), H // x.k.shape[1]
    sides = _sides(x, seen, work)
    # The heads of a position are adjacent in memory: the next projection reads o without a copy.
    o, do = (x.q.new_empty(R, Q, H, D).transpose(1, 2) for _ in range(2))
    low = (torch.empty_like(o), torch.empty_like(do)) if work != x.q.dtype else (None, None)
    lse, mean = (x.q.new_empty(R, H, Q, 1, dtype=work) for _ in range(2))
    for number, rows in _rows(Q):
        q, dq = (heads.tile(t, rows) / math.sqrt(D) for t in (x.q, x.dq))
        acc, acc_t = torch.zeros_like(q), torch.zeros_like(q)
        top, total, mu = (q.new_full((*q.shape[:3], 1), value) for value in (-math.inf, 0.0, 0.0))
        for index, keys, s, ds in _walk(sides, seen, q, dq, number, rows, groups):
            v, dv = sides[index].v[:, :, keys], sides[index].dv
            new_top = torch.maximum(top, s.amax(-1, keepdim=True))
            base = new_top.masked_fill(new_top == -math.inf, 0)  # a query that has seen nothing yet
            rescale, p = (top - base).exp(), (s - base).exp()
            total = total * rescale + p.sum(-1, keepdim=True)
            change = (p * (ds - mu)).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1)
            mu = mu + change
            acc_t = (acc_t - acc * change) * rescale + (p * (ds - mu)) @ v
            acc = acc * rescale + p @ v
            if dv is not None:
                acc_t += p @ dv[:, :, keys]
            top = new_top
        some = total.masked_fill(total == 0, 1)
        for sums, into, rest in ((acc, o, low[0]), (acc_t, do, low[1])):
            heads.untile(sums / some, into, rows)
            if rest is not None:
                heads.untile(sums / some - heads.tile(into, rows), rest, rows)
        heads.untile((top + some.log()).masked_fill(total == 0, math.inf), lse, rows)
        heads.untile(mu, mean, rows)
    return (o, do), (*low, lse, mean)


def backward(
    x: Inputs,
    seen: Visibility,
    outputs: tuple[Tensor, Tensor],
    kept: tuple[Any, ...],
    g: Tensor,
    h: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the eight inputs, in their dtypes, from the outputs of `forward` and the cotangents of o and do."""
    *low, lse, mean = kept
    work = lse.dtype
    D, groups = x.q.shape[3], x.q.shape[1] // x.k.shape[1]
    heads = _Heads(x.k.shape[1], work)
    sides = _sides(x, seen, work)
    grad_q, grad_dq = (x.q.new_empty(x.q.shape) for _ in range(2))
    grads = [_Side(*(None if t is None else torch.zeros_like(t) for t in side[:4]), side.at, []) for side in sides]  # type: ignore[arg-type]
    for number, rows in _rows(x.q.shape[2]):
        q, dq = (heads.tile(t, rows) / math.sqrt(D) for t in (x.q, x.dq))
        gt, ht, ot, dot, lse_t, mu = (heads.tile(t, rows) for t in (g, h, *outputs, lse, mean))
        if low[0] is not None:
            ot, dot = ot + heads.tile(low[0], rows), dot + heads.tile(low[1], rows)
        s1 = (ht * ot).sum(-1, keepdim=True)
        s2 = (ht * dot + gt * ot).sum(-1, keepdim=True)
        acc, acc_t = torch.zeros_like(q), torch.zeros_like(q)
        for index, keys, s, ds in _walk(sides, seen, q, dq, number, rows, groups):
            k, v, dk, dv = (None if t is None else t[:, :, keys] for t in sides[index][:4])
            assert k is not None and v is not None
            into = [None if t is None else t[:, :, keys] for t in grads[index][:4]]
            p, n = (s - lse_t).exp(), ds - mu
            b = gt @ v.mT
            if dv is not None:
                b += ht @ dv.mT
            d_ds = p * (ht @ v.mT - s1)
            d_s = d_ds * n + p * (b - s2)
            acc += d_s @ k
            acc_t += d_ds @ k
            _add(into[0], d_s.mT @ q + d_ds.mT @ dq)
            _add(into[1], (p * n).mT @ ht + p.mT @ gt)
            if dk is not None:
                acc += d_ds @ dk
                _add(into[2], d_ds.mT @ q)
                _add(into[3], p.mT @ ht)
        heads.untile(acc / math.sqrt(D), grad_q, rows)
        heads.untile(acc_t / math.sqrt(D), grad_dq, rows)
    own, context = grads[-1], grads[0] if len(grads) == 2 else None
    outs = [grad_q, own.k, own.v, grad_dq, own.dk, own.dv, context and context.k, context and context.v]
    return [None if t is None else t.to(x.q.dtype) for t in outs]


def _add(into: Tensor | None, what: Tensor) -> None:
    """into += what."""
    assert into is not None
    into += what
