"""Attention with its tangent on a GPU: errors, milliseconds and peak memory of the Triton kernels.

    forward, backward      at 24 heads of 128 and length 8192 in bf16: value and tangent, and the gradient through both;
                           compared with explicit attention with the same tangent, and torch's attention without tangent
    forward_1024 ...       the same by length, without context or copies; `growth` is peak(longest) / (2 peak(half of
                           it)): 1 where memory is linear, 2 where it is quadratic
    float32, bfloat16      the largest errors over small shapes of every kind, against autograd in float64, of outputs
                           and gradients: norm of the difference over norm of the exact result. `peak`: root mean square
                           difference over the largest magnitude of the exact result. Rounding to bf16: 1.7e-3 of the
                           norm

With `sweep` every kernel is timed alone under several tilings, and the fastest are used for the rest of the run; each
result is printed at once. Kernels are compiled in parallel in advance. Explicit attention is quadratic in memory: it
runs `math_heads` heads at a time, and its times are scaled to all heads (its peak is not). A ratio above 1 means that
the kernels are faster.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from eval.metrics.launches import Launch, compile_all, milliseconds, recorded_launches
from eval.task import Context, Measure, Outcome, TaskOptions, task
from omni.nn.attention import jvp_launch as launch
from omni.nn.attention.backends import AttentionMask
from omni.nn.attention.jvp import attend_with_tangent
from omni.rng import Key
from omni.sequence.mask import Fields

NEEDS_CUDA = (
    "the task jvp_attention measures CUDA kernels, and this machine has no CUDA device; leave it out of `tasks`"
)

# Tilings (queries, keys, warps, stages) that `sweep` times at head width 128 in bf16, the most promising first.
SWEEP = {
    "forward": ((128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 4), (64, 32, 4, 2), (128, 32, 8, 2), (64, 64, 4, 2)),
    "grad_q": ((128, 32, 8, 3), (128, 32, 8, 2), (128, 16, 8, 3), (64, 32, 4, 2)),
    "grad_k": ((32, 128, 8, 3), (32, 128, 8, 2), (16, 128, 8, 3), (32, 64, 4, 2)),
    "grad_v": ((32, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 4), (32, 64, 4, 2), (32, 128, 8, 2)),
}


class JvpAttentionOptions(TaskOptions):
    """copies: number of private copies that the queries form; 0: every query attends to every key. context: keys
    without tangents, visible to every query. math_heads: heads of explicit attention at a time; 0 omits it. sweep: see
    the head of the file. cases: whether small shapes are compared with float64. lengths: of the table by length."""

    heads: int = Field(default=24, ge=1)
    key_heads: int = Field(default=24, ge=1)
    head_dim: int = 128
    length: int = Field(default=8192, ge=1)
    context: int = Field(default=0, ge=0)
    copies: int = Field(default=0, ge=0)
    repeats: int = Field(default=10, ge=3)
    math_heads: int = Field(default=4, ge=0)
    sweep: bool = False
    cases: bool = True
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)


# Report rows: of the kernels, of explicit attention, of attention without tangent, of errors by dtype.
KERNEL_ROWS = ("forward", "backward", "peak", "saved")
MATH_ROWS = ("forward_math", "backward_math", "peak_math", "forward_ratio", "backward_ratio", "error", "error_gradient")
PLAIN_ROWS = ("forward_plain", "backward_plain")
ERROR_ROWS = tuple(f"{dtype}{what}" for dtype in ("float32", "bfloat16") for what in ("", "_gradient", "_peak"))


def _rows(options: JvpAttentionOptions) -> tuple[str, ...]:
    """All report rows; suites set bars on these names."""
    by_length = (f"{name}_{n}" for n in options.lengths for name in ("forward", "backward", "peak"))
    return (*KERNEL_ROWS, *MATH_ROWS, *PLAIN_ROWS, *ERROR_ROWS, *by_length, "growth")


@task("jvp_attention", JvpAttentionOptions, rows=_rows)
def jvp_attention(context: Context, options: JvpAttentionOptions) -> Outcome:
    """Attention with its tangent on CUDA: errors, time and memory, forward and backward, against explicit attention."""
    if not torch.cuda.is_available():
        raise ValueError(NEEDS_CUDA)
    if options.sweep and (options.copies or options.context or options.head_dim != 128 or options.length % 128):
        raise ValueError("jvp_attention.sweep is for head width 128, lengths in multiples of 128, no copies or context")
    key, device = context.key("jvp_attention"), torch.device("cuda")
    runs = list(cases(key, device)) if options.cases else []
    inputs, mask = _inputs(key, options, options.length, options.heads, options.key_heads), _mask(options)
    _prepare(context, options, [*runs, Case("", inputs, mask, torch.bfloat16)])
    if options.sweep:
        _sweep(context, options, inputs, mask)
    measures = _errors(context, runs)
    ours = _measure(inputs, mask, "triton", options.repeats)
    measures += [Measure(name, ours[name], "MiB" if name in ("peak", "saved") else "ms") for name in KERNEL_ROWS]
    _report_rates(context, options, ours)
    if options.math_heads:
        measures += _beside_math(key, options, mask, ours)
    measures += _plain(inputs, options)
    measures += _by_length(context, key, options)
    notes = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {options.heads} heads ({options.key_heads} of "
        f"keys) of {options.head_dim}, length {options.length}, context {options.context}, copies {options.copies}; "
        f"medians of {options.repeats}; kernels on bf16, explicit attention computes in float32; peak: above what the "
        "inputs take",
        f"tiles (queries, keys, warps, stages): {', '.join(str(tuple(t)) for t in launch.tilings(inputs[0]))}",
    ]
    return Outcome(measures, notes=notes)


# ---- tiles -----------------------------------------------------------------------------------------------------------


def _prepare(context: Context, options: JvpAttentionOptions, runs: list[Case]) -> None:
    """Compile all kernels of the run in parallel."""
    start = time.perf_counter()
    with recorded_launches() as launches:
        for case in runs:
            gradients(case.inputs, case.mask, "triton", case.dtype)
    candidates = list(_candidates(launches[-5:])) if options.sweep else []
    failures = compile_all([*launches, *candidates])
    context.report(f"{len(launches) + len(candidates)} launches compiled in {time.perf_counter() - start:.1f} s")
    for failed, failure in failures:
        context.report(f"  {failed.name} {failed.tiles} does not compile: {failure}")


def _candidates(launches: list[Launch]) -> Iterator[Launch]:
    """The launches of one call under the tilings of SWEEP."""
    for found in launches:
        resident = found.name in ("grad_k", "grad_v")  # the index, in tiles, of the dimension that the grid counts
        for tiles in SWEEP.get(found.name, ()):
            options = found.options | dict(zip(("BQ", "BK", "num_warps", "num_stages"), tiles, strict=True))
            count = found.grid[0] * found.tiles[resident] // tiles[resident]
            yield found._replace(grid=(count, found.grid[1]), options=options)


def _sweep(context: Context, options: JvpAttentionOptions, inputs: list[Tensor], mask: AttentionMask | None) -> None:
    """Time every kernel alone under the tilings of SWEEP; put the fastest into the kernels' table."""
    with recorded_launches(also_run=("forward", "row_sums")) as launches:
        gradients(inputs, mask, "triton", torch.bfloat16)
    table = launch.BY_CAPABILITY.get(torch.cuda.get_device_capability(), launch.SMALL)
    known = table[128, 2]._asdict()
    for name in SWEEP:
        best = float("inf")
        for candidate in _candidates([x for x in launches if x.name == name]):
            try:
                took = milliseconds(candidate.run)
            except Exception as error:  # the device may not support a candidate
                context.report(f"  {name} {candidate.tiles}: {type(error).__name__}: {error}".splitlines()[0][:200])
                continue
            context.report(f"  {name} {candidate.tiles}: {took:.3f} ms")
            if took < best:
                best, known[name] = took, launch.Tiling(*candidate.tiles)
    table[128, 2] = launch.Tilings(**known)
    context.report(f"  fastest: {table[128, 2]}")


# ---- errors ----------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """inputs: q, k, v, dq, dk, dv, keys and values of the context, and the cotangents of o and do."""

    name: str
    inputs: list[Tensor]
    mask: AttentionMask | Tensor | None
    dtype: torch.dtype


def cases(key: Key, device: torch.device) -> Iterator[Case]:
    """Small shapes of every kind, with inputs that are exact in both dtypes."""
    for dtype in (torch.bfloat16, torch.float32):
        for D in (64, 128):
            made = partial(case_inputs, key.fold(D), D=D, device=device)
            name = f"{str(dtype).removeprefix('torch.')} {D}"
            yield Case(f"{name}, whole tiles", made(1, 2, 2, 512, 0), None, dtype)
            yield Case(f"{name}, ragged, grouped, context", made(2, 4, 2, 331, 77), None, dtype)
            yield Case(f"{name}, copies, context", made(1, 2, 2, 384, 100), copies(384, 100, 3, device), dtype)
            if D == 128:
                visible = key.fold("dense").uniform((1, 1, 90, 123)).to(device) < 0.5
                visible[:, :, -1] = False
                yield Case(f"{name}, a dense mask", made(1, 2, 1, 90, 33), visible, dtype)
                far = made(1, 2, 2, 512, 0)
                for n in (1, 2, 4):
                    far[n] += 4 * key.fold("common", n).normal((D,)).to(device, torch.bfloat16).double()
                yield Case(f"{name}, a large common part", [x.bfloat16().double() for x in far], None, dtype)
    yield Case("bfloat16 128, long", made(1, 2, 2, 4096, 0), None, torch.bfloat16)


def case_inputs(key: Key, R: int, H: int, G: int, Q: int, T: int, D: int, device: torch.device) -> list[Tensor]:
    """A case's inputs: float64 values that are exact in bfloat16."""
    query, own, far = (R, H, Q, D), (R, G, Q, D), (R, G, T, D)
    shapes = (query, own, own, query, own, own, far, far, query, query)
    return [key.fold(n).normal(shape).to(device, torch.bfloat16).double() for n, shape in enumerate(shapes)]


def copies(length: int, context: int, number: int, device: torch.device) -> AttentionMask:
    """The mask of queries in `number` private copies after a context that all see."""
    own = torch.arange(length, device=device).expand(1, -1)
    far = torch.zeros(1, context, dtype=torch.int64, device=device)
    queries = Fields(own * 0, own * 0 + 1, 1 + own * number // length)
    return AttentionMask(queries, Fields(far, far, far).then(queries))


def _errors(context: Context, runs: list[Case]) -> list[Measure]:
    """The largest errors over all cases, by dtype; NaN where one fails."""
    worst = {name: 0.0 for name in ERROR_ROWS}
    for case in runs:
        name = str(case.dtype).removeprefix("torch.")
        try:
            found = gradients(case.inputs, case.mask, "triton", case.dtype)
        except Exception as error:
            context.report(f"  {case.name}: {type(error).__name__}: {error}".splitlines()[0][:300])
            for what in ("", "_gradient", "_peak"):
                worst[name + what] = float("nan")
            continue
        wanted = gradients(case.inputs, case.mask, "math", torch.float64)
        pairs = [(a.double(), b) for a, b in zip(found, wanted, strict=True) if b.numel()]
        far = [float((a - b).norm() / b.norm()) for a, b in pairs]
        peak = max(float((a - b).pow(2).mean().sqrt() / b.abs().max()) for a, b in pairs)
        context.report(f"  {case.name}: {' '.join(f'{x:.1e}' for x in far)}; peak {peak:.1e}")
        for row, value in ((name, max(far[:2])), (f"{name}_gradient", max(far[2:])), (f"{name}_peak", peak)):
            worst[row] = value if math.isnan(value) or value > worst[row] else worst[row]  # NaN stays
    known = {str(case.dtype).removeprefix("torch.") for case in runs}
    return [Measure(name, value, "") for name, value in worst.items() if name.partition("_")[0] in known]


# ---- time and memory -------------------------------------------------------------------------------------------------


def _inputs(key: Key, options: JvpAttentionOptions, length: int, heads: int, key_heads: int) -> list[Tensor]:
    """q, k, v, dq, dk, dv, keys and values of the context, and the cotangents of o and do, in bf16."""
    Q, T, D = length, options.context, options.head_dim
    query, own, far = (1, heads, Q, D), (1, key_heads, Q, D), (1, key_heads, T, D)
    shapes = (query, own, own, query, own, own, far, far, query, query)
    keys = (key.fold("inputs", n).generator("cuda") for n in range(len(shapes)))
    return [torch.randn(s, generator=g, device="cuda").bfloat16() for s, g in zip(shapes, keys, strict=True)]


def _mask(options: JvpAttentionOptions) -> AttentionMask | None:
    """The mask of the options; None where every query sees every key."""
    return copies(options.length, options.context, options.copies, torch.device("cuda")) if options.copies else None


def _report_rates(context: Context, options: JvpAttentionOptions, ours: dict[str, float]) -> None:
    """Print the rate of matrix products: 6 per tile forward, 24 backward (context: 4 and 16)."""
    tile = 2e-12 * options.heads * options.head_dim * options.length
    for name, own, far in (("forward", 6, 4), ("backward", 24, 16)):
        total = tile * (own * options.length / max(1, options.copies) + far * options.context)
        context.report(f"  {name}: {ours[name]:.3f} ms, {total:.2f} TFLOP, {1e3 * total / ours[name]:.0f} TFLOP/s")


def _beside_math(
    key: Key, options: JvpAttentionOptions, mask: AttentionMask | None, ours: dict[str, float]
) -> list[Measure]:
    """Explicit attention on a few heads, scaled to all; and the kernels' difference from it in float32."""
    few = _inputs(key, options, options.length, options.math_heads, options.math_heads)
    scale = options.heads / options.math_heads
    theirs = _measure(few, mask, "math", 3)
    forward, backward = theirs["forward"] * scale, theirs["backward"] * scale
    one = [x[:, :1] for x in few]
    found, wanted = (gradients(one, mask, backend, dtype) for backend, dtype in _PRECISIONS)
    far = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True) if b.numel()]
    return [
        Measure("forward_math", forward, "ms"),
        Measure("backward_math", backward, "ms"),
        Measure("peak_math", theirs["peak"], "MiB"),
        Measure("forward_ratio", forward / ours["forward"], "x"),
        Measure("backward_ratio", backward / ours["backward"], "x"),
        Measure("error", max(far[:2]), ""),
        Measure("error_gradient", max(far[2:]), ""),
    ]


# The backend and dtype that are compared, and those of the reference.
_PRECISIONS = (("triton", torch.bfloat16), ("math", torch.float32))


def _plain(inputs: list[Tensor], options: JvpAttentionOptions) -> list[Measure]:
    """torch's own attention of the own keys without tangent, for scale: 2 products per tile forward, 5 backward."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    attend = partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, enable_gqa=q.shape[1] != k.shape[1])
    backward = partial(torch.autograd.grad, attend(), (q, k, v), inputs[8], retain_graph=True)
    times = (milliseconds(run, most=options.repeats) for run in (attend, backward))
    return [Measure(name, took, "ms") for name, took in zip(PLAIN_ROWS, times, strict=True)]


def _by_length(context: Context, key: Key, options: JvpAttentionOptions) -> list[Measure]:
    """Time and memory by length, and the growth of memory."""
    measures, peaks = [], {}
    plain = options.model_copy(update={"context": 0})
    for n in options.lengths:
        ours = _measure(_inputs(key, plain, n, options.heads, options.key_heads), None, "triton", options.repeats)
        peaks[n] = ours["peak"]
        context.report(
            f"  length {n}: {ours['forward']:.3f} ms forward, {ours['backward']:.3f} backward, {ours['peak']:.0f} MiB"
        )
        measures += [Measure(f"{name}_{n}", ours[name], "MiB" if name == "peak" else "ms") for name in KERNEL_ROWS[:3]]
    longest = max(peaks, default=0)
    if longest // 2 in peaks:
        measures.append(Measure("growth", peaks[longest] / peaks[longest // 2] / 2, "x"))
    return measures


def _attend(inputs: list[Tensor], mask: AttentionMask | Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """Output and tangent, from the first eight inputs."""
    q, k, v, dq, dk, dv, k_context, v_context = inputs[:8]
    return attend_with_tangent(q, k, v, dq, dk, dv, k_context, v_context, mask, backend)


def gradients(
    inputs: list[Tensor], mask: AttentionMask | Tensor | None, backend: str, dtype: torch.dtype
) -> list[Tensor]:
    """o, do and the gradients of the eight inputs, computed in `dtype`."""
    given = [x.detach().to(dtype) for x in inputs]
    leaves = [x.requires_grad_() for x in given[:8]]
    outputs = _attend(leaves, mask, backend)
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, leaves, given[8:]))]


def _measure(inputs: list[Tensor], mask: AttentionMask | None, backend: str, repeats: int) -> dict[str, float]:
    """Medians in milliseconds of the forward (with a graph) and the backward, peak and saved memory in MiB."""
    leaves = [x.detach().requires_grad_() for x in inputs[:8]]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = _attend(leaves, mask, backend)
    torch.cuda.synchronize()
    saved = torch.cuda.memory_allocated() - start
    backward: Callable[[], object] = partial(torch.autograd.grad, outputs, leaves, inputs[8:], retain_graph=True)
    backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - start
    return {
        "forward": milliseconds(partial(_attend, leaves, mask, backend), 1e3, repeats),
        "backward": milliseconds(backward, 1e3, repeats),
        "peak": peak / 2**20,
        "saved": saved / 2**20,
    }
