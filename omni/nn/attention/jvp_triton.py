"""Triton kernels of attention with its tangent: one forward, and a backward in three kinds (see jvp.py).

    forward   a resident tile of queries visits the tiles of keys that it sees: the context's, then its own
    row sums  s1 and s2 per query, from the outputs and their cotangents
    grad_q    queries resident: gradients of q and dq
    grad_k    keys resident: gradients of k and dk;   grad_v: keys resident: gradients of v and dv
              each once for own keys and once for the context, whose tangents are zero: half of the products are skipped

Weights are rounded to operands. A large common part of keys or values multiplies the rounding error of their sum. So
the forward divides by the sum of the rounded weights. The tangent's weights sum to 0 exactly; the forward subtracts
their rounded sum times the mean value. grad_q does the same with the mean keys (`means`).

No kernel keeps more than two wide accumulators, to save registers. There are no atomics, so results repeat. Lists omit
tiles where nothing is visible. Where all is visible there are no lists; where tiles divide the lengths (EVEN), no
bounds. Products of bf16 accumulate in float32; float32 operands are split into three products of tf32 (FLOAT32), which
keep about 21 bits of each.

`load` imports Triton; until then the functions below are plain. Triton's interpreter (TRITON_INTERPRET=1 before
Triton's first import) runs them without a GPU. It multiplies the bit patterns of bf16 tiles as integers and truncates
where a GPU rounds; so under it (EMULATE) tiles are float32 with rounded values.

Legend: R batch rows, H query heads, G key heads, Q queries, T context keys, S own keys, D head width; BQ, BK tile
sizes. A tensor of four axes is (pointer, stride of rows, stride of heads, stride of positions).
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import triton.language as tl

NO_MASK, FIELDS, DENSE = 0, 1, 2  # kinds of masks

FLOAT32: Any = None  # the precision of float32 products, a Triton constant; `load` sets it
interpreted = False  # whether Triton's interpreter is on; `load` sets it
_DEVICE_FUNCTIONS: list[str] = []


def _device(function: Any) -> Any:
    """Mark a function for `triton.jit`, which `load` applies."""
    _DEVICE_FUNCTIONS.append(function.__name__)
    return function


@cache
def load() -> None:
    """Import Triton and compile this file's functions with it. ValueError if it is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError("attention backend 'triton' needs Triton: pip install 'omni-flow[gpu]', or use 'streamed'")
    import triton
    import triton.language as tl

    module = globals()
    module.update(triton=triton, tl=tl, FLOAT32=tl.constexpr("tf32x3"))
    for name in _DEVICE_FUNCTIONS:
        module[name] = triton.jit(module[name])
    module["interpreted"] = os.environ.get("TRITON_INTERPRET") == "1"


# ---- tiles -----------------------------------------------------------------------------------------------------------


@_device
def _operand(x, DTYPE: tl.constexpr, EMULATE: tl.constexpr):
    """A tile as an operand of a product: in DTYPE; under the interpreter, float32 rounded to it, to nearest even."""
    if EMULATE:
        x = x.to(tl.float32)
        if DTYPE == tl.bfloat16:  # noqa: SIM300
            bits = x.to(tl.int32, bitcast=True)
            bits = bits + 0x7FFF + ((bits >> 16) & 1)
            x = (bits & -65536).to(tl.float32, bitcast=True)
    else:
        x = x.to(DTYPE)
    return x


@_device
def _pointers(x, r, h, start, D: tl.constexpr, N: tl.constexpr):
    base = x[0] + r.to(tl.int64) * x[1] + h.to(tl.int64) * x[2] + start.to(tl.int64) * x[3]
    return base + tl.arange(0, N)[:, None] * x[3] + tl.arange(0, D)[None, :]


@_device
def _read(x, r, h, start, length, D: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr, EMULATE: tl.constexpr):
    """Positions start .. start + N of (r, h), (N, D); zeros past the length."""
    if EVEN:
        tile = tl.load(_pointers(x, r, h, start, D, N))
    else:
        inside = (start + tl.arange(0, N) < length)[:, None]
        tile = tl.load(_pointers(x, r, h, start, D, N), mask=inside, other=0.0)
    if EMULATE:
        tile = tile.to(tl.float32)
    return tile


@_device
def _write(x, r, h, start, length, tile, D: tl.constexpr, N: tl.constexpr, EMULATE: tl.constexpr):
    inside = (start + tl.arange(0, N) < length)[:, None]
    tl.store(_pointers(x, r, h, start, D, N), _operand(tile, x[0].dtype.element_ty, EMULATE), mask=inside)


@_device
def _write_exact(
    x, low, r, h, start, length, tile,
    D: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Write a float32 tile in DTYPE, and its rounding error."""
    _write(x, r, h, start, length, tile, D, N, EMULATE)
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        rounded = _operand(tile, DTYPE, EMULATE).to(tl.float32)
        _write(low, r, h, start, length, tile - rounded, D, N, EMULATE)


@_device
def _read_exact(
    x, low, r, h, start, length,
    D: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    tile = _read(x, r, h, start, length, D, N, False, EMULATE).to(tl.float32)
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        tile += _read(low, r, h, start, length, D, N, False, EMULATE).to(tl.float32)
    return tile


@_device
def _per_query(x, head, at, num_q, other):
    """Numbers (R H, Q) of the queries `at` of a head; `other` past the last."""
    return tl.load(x + head.to(tl.int64) * num_q + at, mask=at < num_q, other=other)


@_device
def _visible(mask, r, qi, ki, num_q, num_k, MASK: tl.constexpr):
    """omni.sequence.mask.visible on a tile. Positions qi (BQ, 1) and ki (1, BK), or (1, BQ) and (BK, 1).

    No key past the last is visible. Queries past the last may see keys: their results are not stored, or have weight 0.
    FIELDS: of a query its document, the limit of the context blocks that it sees, its copy; of a key its document, its
    block (own keys: above every limit) and its copy (context keys: no query's).
    """
    if MASK == 1:
        q_fields, k_fields = mask[0] + r * 3 * num_q + qi, mask[1] + r * 3 * num_k + ki
        q_document = tl.load(q_fields, mask=qi < num_q, other=0)
        q_limit = tl.load(q_fields + num_q, mask=qi < num_q, other=0)
        q_copy = tl.load(q_fields + 2 * num_q, mask=qi < num_q, other=0)
        k_document = tl.load(k_fields, mask=ki < num_k, other=-0x80000000)
        k_block = tl.load(k_fields + num_k, mask=ki < num_k, other=0)
        k_copy = tl.load(k_fields + 2 * num_k, mask=ki < num_k, other=0)
        seen = (q_document == k_document) & ((k_block < q_limit) | (k_copy == q_copy))
    elif MASK == 2:
        at = mask[0] + r.to(tl.int64) * mask[1] + qi.to(tl.int64) * mask[2] + ki
        seen = tl.load(at, mask=(qi < num_q) & (ki < num_k), other=0) != 0
    else:
        seen = ki < num_k
    return seen


@_device
def _scores(a, da, b, db, A: tl.constexpr, B: tl.constexpr):
    """The tangent da b^T + a db^T of a b^T; A, B: which side has one."""
    if A:
        ds = tl.dot(da, tl.trans(b), input_precision=FLOAT32)
        if B:
            ds = tl.dot(a, tl.trans(db), ds, input_precision=FLOAT32)
    else:
        ds = tl.dot(a, tl.trans(db), input_precision=FLOAT32)
    return ds


@_device
def _count(tiles, r, tile, length, N: tl.constexpr, MASK: tl.constexpr):
    """The number of tiles of N positions that a tile visits: all, or those in its list."""
    return tl.cdiv(length, N) if MASK == 0 else tl.load(tiles[0] + r * tiles[2] + tile)


@_device
def _start(tiles, r, tile, i, N: tl.constexpr, MASK: tl.constexpr):
    """The first position of the i-th tile that a tile visits."""
    return i * N if MASK == 0 else tl.load(tiles[1] + (r * tiles[2] + tile).to(tl.int64) * tiles[3] + i) * N


# ---- forward ---------------------------------------------------------------------------------------------------------


@_device
def _sweep(
    state, q, dq, k, dk, v, dv, mask, tiles, r, g, tile, num_q, num_k, scale, scale2,
    OWN: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    DTYPE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Add the keys of one side to the running sums of a tile of queries, as in jvp.py."""
    acc, acc_t, m, total, mu, given, drift = state
    qi = (tile * BQ + tl.arange(0, BQ))[:, None]
    for i in range(0, _count(tiles, r, tile, num_k, BK, MASK)):
        start = _start(tiles, r, tile, i, BK, MASK)
        k_tile = _read(k, r, g, start, num_k, D, BK, EVEN, EMULATE)
        dk_tile = k_tile
        if OWN:
            dk_tile = _read(dk, r, g, start, num_k, D, BK, EVEN, EMULATE)
        s = tl.dot(q, tl.trans(k_tile), input_precision=FLOAT32)
        ds = _scores(q, dq, k_tile, dk_tile, True, OWN)
        if MASK != 0 or not EVEN:
            seen = _visible(mask, r, qi, (start + tl.arange(0, BK))[None, :], num_q, num_k, MASK)
            s = tl.where(seen, s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale2)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s * scale2 - m_new[:, None])
        m = m_new
        total = total * alpha + tl.sum(p, 1)
        w = p * (ds * scale - mu[:, None])
        dmu = tl.sum(w, 1) / (total if MASK == 0 else tl.where(total > 0, total, 1.0))
        mu = mu + dmu
        acc, given = acc * alpha[:, None], given * alpha
        acc_t, drift = acc_t * alpha[:, None] - acc * dmu[:, None], drift * alpha - given * dmu
        v_tile = _read(v, r, g, start, num_k, D, BK, EVEN, EMULATE)
        weight, moved = _operand(p, DTYPE, EMULATE), _operand(w - p * dmu[:, None], DTYPE, EMULATE)
        given += tl.sum(weight.to(tl.float32), 1)
        drift += tl.sum(moved.to(tl.float32), 1)
        acc = tl.dot(weight, v_tile, acc, input_precision=FLOAT32)
        acc_t = tl.dot(moved, v_tile, acc_t, input_precision=FLOAT32)
        if OWN:
            dv_tile = _read(dv, r, g, start, num_k, D, BK, EVEN, EMULATE)
            acc_t = tl.dot(weight, dv_tile, acc_t, input_precision=FLOAT32)
    return acc, acc_t, m, total, mu, given, drift


@_device
def forward(
    q, dq, k, dk, v, dv, k_context, v_context, o, do, o_low, do_low, lse, mu, mask, mask_context, tiles, tiles_context,
    num_q, num_k, num_context, heads, group, scale, scale2,
    CONTEXT: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    DTYPE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    tile, r, h = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    g, start = h // group, tile * BQ
    q_tile = _read(q, r, h, start, num_q, D, BQ, EVEN, EMULATE)
    dq_tile = _read(dq, r, h, start, num_q, D, BQ, EVEN, EMULATE)
    acc, acc_t = tl.zeros([BQ, D], tl.float32), tl.zeros([BQ, D], tl.float32)
    # m: the largest score so far. Its start is finite: a query that has seen nothing has weights of 0.
    m, total, mean = tl.zeros([BQ], tl.float32) - 1e30, tl.zeros([BQ], tl.float32), tl.zeros([BQ], tl.float32)
    given, drift = tl.zeros([BQ], tl.float32), tl.zeros([BQ], tl.float32)  # sums of the rounded weights
    if CONTEXT:
        acc, acc_t, m, total, mean, given, drift = _sweep(
            (acc, acc_t, m, total, mean, given, drift), q_tile, dq_tile, k_context, k_context, v_context, v_context,
            mask_context, tiles_context, r, g, tile, num_q, num_context, scale, scale2, False, MASK, EVEN, D, BQ, BK,
            DTYPE, EMULATE,
        )  # fmt: skip
    acc, acc_t, m, total, mean, given, drift = _sweep(
        (acc, acc_t, m, total, mean, given, drift), q_tile, dq_tile, k, dk, v, dv, mask,
        tiles, r, g, tile, num_q, num_k, scale, scale2, True, MASK, EVEN, D, BQ, BK, DTYPE, EMULATE,
    )  # fmt: skip
    some = tl.where(total > 0, total, 1.0)
    given = tl.where(given > 0, given, 1.0)
    acc = acc / given[:, None]
    _write_exact(o, o_low, r, h, start, num_q, acc, D, BQ, DTYPE, EMULATE)
    acc_t = (acc_t - drift[:, None] * acc) / given[:, None]
    _write_exact(do, do_low, r, h, start, num_q, acc_t, D, BQ, DTYPE, EMULATE)
    at = start + tl.arange(0, BQ)
    statistics = tl.program_id(1).to(tl.int64) * num_q + at
    tl.store(lse + statistics, tl.where(total > 0, m + tl.log2(some), float("inf")), mask=at < num_q)  # base 2
    tl.store(mu + statistics, mean, mask=at < num_q)


# ---- backward --------------------------------------------------------------------------------------------------------


@_device
def row_sums(
    o, do, o_low, do_low, cotangent, dcotangent, s1, s2, num_q, heads,
    D: tl.constexpr, BQ: tl.constexpr, DTYPE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    tile, r, h = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    start = tile * BQ
    o_tile = _read_exact(o, o_low, r, h, start, num_q, D, BQ, DTYPE, EMULATE)
    do_tile = _read_exact(do, do_low, r, h, start, num_q, D, BQ, DTYPE, EMULATE)
    c = _read(cotangent, r, h, start, num_q, D, BQ, False, EMULATE).to(tl.float32)
    dc = _read(dcotangent, r, h, start, num_q, D, BQ, False, EMULATE).to(tl.float32)
    at = start + tl.arange(0, BQ)
    statistics = tl.program_id(1).to(tl.int64) * num_q + at
    tl.store(s1 + statistics, tl.sum(dc * o_tile, 1), mask=at < num_q)
    tl.store(s2 + statistics, tl.sum(dc * do_tile + c * o_tile, 1), mask=at < num_q)


@_device
def _sweep_q(
    acc, acc_t, left, left_t, q, dq, c, dc, lse, mu, s1, s2, k, dk, v, dv, mask, tiles, r, g, tile, num_q, num_k,
    scale, scale2,
    OWN: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    DTYPE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    qi = (tile * BQ + tl.arange(0, BQ))[:, None]
    for i in range(0, _count(tiles, r, tile, num_k, BK, MASK)):
        start = _start(tiles, r, tile, i, BK, MASK)
        k_tile = _read(k, r, g, start, num_k, D, BK, EVEN, EMULATE)
        v_tile = _read(v, r, g, start, num_k, D, BK, EVEN, EMULATE)
        dk_tile, dv_tile = k_tile, v_tile
        if OWN:
            dk_tile = _read(dk, r, g, start, num_k, D, BK, EVEN, EMULATE)
            dv_tile = _read(dv, r, g, start, num_k, D, BK, EVEN, EMULATE)
        s = tl.dot(q, tl.trans(k_tile), input_precision=FLOAT32)
        p = tl.exp2(s * scale2 - lse[:, None])
        if MASK != 0 or not EVEN:
            seen = _visible(mask, r, qi, (start + tl.arange(0, BK))[None, :], num_q, num_k, MASK)
            p = tl.where(seen, p, 0.0)
        a = tl.dot(dc, tl.trans(v_tile), input_precision=FLOAT32) - s1[:, None]
        d_ds = _operand(p * a, DTYPE, EMULATE)
        n = _scores(q, dq, k_tile, dk_tile, True, OWN) * scale - mu[:, None]
        b = tl.dot(c, tl.trans(v_tile), a * n - s2[:, None], input_precision=FLOAT32)
        if OWN:
            b = tl.dot(dc, tl.trans(dv_tile), b, input_precision=FLOAT32)
        d_s = _operand(p * b, DTYPE, EMULATE)
        left += tl.sum(d_s.to(tl.float32), 1)
        left_t += tl.sum(d_ds.to(tl.float32), 1)
        acc_t = tl.dot(d_ds, k_tile, acc_t, input_precision=FLOAT32)
        acc = tl.dot(d_s, k_tile, acc, input_precision=FLOAT32)
        if OWN:
            acc = tl.dot(d_ds, dk_tile, acc, input_precision=FLOAT32)
    return acc, acc_t, left, left_t


@_device
def grad_q(
    q, dq, k, dk, v, dv, k_context, v_context, cotangent, dcotangent, lse, mu, s1, s2, means, out, dout,
    mask, mask_context, tiles, tiles_context, num_q, num_k, num_context, heads, group, scale, scale2,
    CONTEXT: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    DTYPE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    tile, r, h = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    g, start = h // group, tile * BQ
    q_tile = _read(q, r, h, start, num_q, D, BQ, EVEN, EMULATE)
    dq_tile = _read(dq, r, h, start, num_q, D, BQ, EVEN, EMULATE)
    c = _read(cotangent, r, h, start, num_q, D, BQ, EVEN, EMULATE)
    dc = _read(dcotangent, r, h, start, num_q, D, BQ, EVEN, EMULATE)
    at = start + tl.arange(0, BQ)
    head = tl.program_id(1)
    lse_tile, mu_tile = _per_query(lse, head, at, num_q, float("inf")), _per_query(mu, head, at, num_q, 0.0)
    s1_tile, s2_tile = _per_query(s1, head, at, num_q, 0.0), _per_query(s2, head, at, num_q, 0.0)
    acc, acc_t = tl.zeros([BQ, D], tl.float32), tl.zeros([BQ, D], tl.float32)
    left, left_t = tl.zeros([BQ], tl.float32), tl.zeros([BQ], tl.float32)  # sums of the rounded weights; exactly: 0
    if CONTEXT:
        acc, acc_t, left, left_t = _sweep_q(
            acc, acc_t, left, left_t, q_tile, dq_tile, c, dc, lse_tile, mu_tile, s1_tile, s2_tile, k_context, k_context,
            v_context, v_context, mask_context, tiles_context, r, g, tile, num_q, num_context, scale, scale2,
            False, MASK, EVEN, D, BQ, BK, DTYPE, EMULATE,
        )  # fmt: skip
    acc, acc_t, left, left_t = _sweep_q(
        acc, acc_t, left, left_t, q_tile, dq_tile, c, dc, lse_tile, mu_tile, s1_tile, s2_tile, k, dk, v, dv,
        mask, tiles, r, g, tile, num_q, num_k, scale, scale2, True, MASK, EVEN, D, BQ, BK, DTYPE, EMULATE,
    )  # fmt: skip
    of_head = means + (r * (heads // group) + g).to(tl.int64) * 2 * D + tl.arange(0, D)
    mean_k, mean_dk = tl.load(of_head)[None, :], tl.load(of_head + D)[None, :]
    acc -= left[:, None] * mean_k + left_t[:, None] * mean_dk
    acc_t -= left_t[:, None] * mean_k
    _write(out, r, h, start, num_q, acc * scale, D, BQ, EMULATE)
    _write(dout, r, h, start, num_q, acc_t * scale, D, BQ, EMULATE)


@_device
def grad_k(
    q, dq, k, dk, v, dv, cotangent, dcotangent, lse, mu, s1, s2, out, dout, mask, tiles,
    num_q, num_k, key_heads, scale, scale2,
    OWN: tl.constexpr, GROUP: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, DTYPE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Scores are transposed, (BK, BQ): they enter the last products from the left without a transposition."""
    tile, r, g = tl.program_id(0), tl.program_id(1) // key_heads, tl.program_id(1) % key_heads
    start = tile * BK
    k_tile = _read(k, r, g, start, num_k, D, BK, EVEN, EMULATE)
    v_tile = _read(v, r, g, start, num_k, D, BK, EVEN, EMULATE)
    dk_tile, dv_tile = k_tile, v_tile
    if OWN:
        dk_tile = _read(dk, r, g, start, num_k, D, BK, EVEN, EMULATE)
        dv_tile = _read(dv, r, g, start, num_k, D, BK, EVEN, EMULATE)
    acc, acc_t = tl.zeros([BK, D], tl.float32), tl.zeros([BK, D], tl.float32)
    ki = (start + tl.arange(0, BK))[:, None]
    num_tiles = _count(tiles, r, tile, num_q, BQ, MASK)
    for member in range(0, GROUP):
        h = g * GROUP + member
        head = r * key_heads * GROUP + h
        for i in range(0, num_tiles):
            q_start = _start(tiles, r, tile, i, BQ, MASK)
            at = q_start + tl.arange(0, BQ)
            q_tile = _read(q, r, h, q_start, num_q, D, BQ, EVEN, EMULATE)
            dq_tile = _read(dq, r, h, q_start, num_q, D, BQ, EVEN, EMULATE)
            c = _read(cotangent, r, h, q_start, num_q, D, BQ, EVEN, EMULATE)
            dc = _read(dcotangent, r, h, q_start, num_q, D, BQ, EVEN, EMULATE)
            lse_tile, mu_tile = _per_query(lse, head, at, num_q, float("inf")), _per_query(mu, head, at, num_q, 0.0)
            s1_tile, s2_tile = _per_query(s1, head, at, num_q, 0.0), _per_query(s2, head, at, num_q, 0.0)
            s = tl.dot(k_tile, tl.trans(q_tile), input_precision=FLOAT32)
            p = tl.exp2(s * scale2 - lse_tile[None, :])
            if MASK != 0:
                p = tl.where(_visible(mask, r, at[None, :], ki, num_q, num_k, MASK), p, 0.0)
            a = tl.dot(v_tile, tl.trans(dc), input_precision=FLOAT32) - s1_tile[None, :]
            d_ds = _operand(p * a, DTYPE, EMULATE)
            n = _scores(k_tile, dk_tile, q_tile, dq_tile, OWN, True) * scale - mu_tile[None, :]
            b = tl.dot(v_tile, tl.trans(c), a * n - s2_tile[None, :], input_precision=FLOAT32)
            if OWN:
                b = tl.dot(dv_tile, tl.trans(dc), b, input_precision=FLOAT32)
            d_s = _operand(p * b, DTYPE, EMULATE)
            if OWN:
                acc_t = tl.dot(d_ds, q_tile, acc_t, input_precision=FLOAT32)
            acc = tl.dot(d_s, q_tile, acc, input_precision=FLOAT32)
            acc = tl.dot(d_ds, dq_tile, acc, input_precision=FLOAT32)
    _write(out, r, g, start, num_k, acc * scale, D, BK, EMULATE)
    if OWN:
        _write(dout, r, g, start, num_k, acc_t * scale, D, BK, EMULATE)


@_device
def grad_v(
    q, dq, k, dk, v, dv, cotangent, dcotangent, lse, mu, s1, s2, out, dout, mask, tiles,
    num_q, num_k, key_heads, scale, scale2,
    OWN: tl.constexpr, GROUP: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, DTYPE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    tile, r, g = tl.program_id(0), tl.program_id(1) // key_heads, tl.program_id(1) % key_heads
    start = tile * BK
    k_tile = _read(k, r, g, start, num_k, D, BK, EVEN, EMULATE)
    dk_tile = k_tile
    if OWN:
        dk_tile = _read(dk, r, g, start, num_k, D, BK, EVEN, EMULATE)
    acc, acc_t = tl.zeros([BK, D], tl.float32), tl.zeros([BK, D], tl.float32)
    ki = (start + tl.arange(0, BK))[:, None]
    num_tiles = _count(tiles, r, tile, num_q, BQ, MASK)
    for member in range(0, GROUP):
        h = g * GROUP + member
        head = r * key_heads * GROUP + h
        for i in range(0, num_tiles):
            q_start = _start(tiles, r, tile, i, BQ, MASK)
            at = q_start + tl.arange(0, BQ)
            q_tile = _read(q, r, h, q_start, num_q, D, BQ, EVEN, EMULATE)
            dq_tile = _read(dq, r, h, q_start, num_q, D, BQ, EVEN, EMULATE)
            c = _read(cotangent, r, h, q_start, num_q, D, BQ, EVEN, EMULATE)
            dc = _read(dcotangent, r, h, q_start, num_q, D, BQ, EVEN, EMULATE)
            lse_tile, mu_tile = _per_query(lse, head, at, num_q, float("inf")), _per_query(mu, head, at, num_q, 0.0)
            s = tl.dot(k_tile, tl.trans(q_tile), input_precision=FLOAT32)
            p = tl.exp2(s * scale2 - lse_tile[None, :])
            if MASK != 0:
                p = tl.where(_visible(mask, r, at[None, :], ki, num_q, num_k, MASK), p, 0.0)
            n = _scores(k_tile, dk_tile, q_tile, dq_tile, OWN, True) * scale - mu_tile[None, :]
            weight = _operand(p, DTYPE, EMULATE)
            if OWN:
                acc_t = tl.dot(weight, dc, acc_t, input_precision=FLOAT32)
            acc = tl.dot(weight, c, acc, input_precision=FLOAT32)
            acc = tl.dot(_operand(p * n, DTYPE, EMULATE), dc, acc, input_precision=FLOAT32)
    _write(out, r, g, start, num_k, acc, D, BK, EMULATE)
    if OWN:
        _write(dout, r, g, start, num_k, acc_t, D, BK, EMULATE)
