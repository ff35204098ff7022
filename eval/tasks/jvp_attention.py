"""Attention with its tangent on a GPU: milliseconds and peak memory of the Triton kernels, beside explicit attention.

    jvp_attention   forward with tangent, and the backward through both, at 24 heads of 128 and length 8192

Explicit attention is quadratic in memory: it runs head by head, `math_heads` at a time, and its times are scaled to all
heads (its peak is not); the kernels run all heads at once. Ratios above 1 mean that the kernels are faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from eval.task import Context, Measure, Outcome, TaskOptions, task
from omni.mask import Fields
from omni.nn.attention import AttentionMask
from omni.nn.jvp_attention import attend_with_tangent

NEEDS_CUDA = (
    "the task jvp_attention measures CUDA kernels, and this machine has no CUDA device; leave it out of `tasks`"
)


class JvpAttentionOptions(TaskOptions):
    """copies: into how many private copies the queries fall, 0: all see all. context: keys without tangents before
    them, which every query sees. math_heads: heads of explicit attention at a time; 0 leaves it out. tile: queries,
    keys, warps and stages of the kernels' tiles in place of the built-in ones."""

    heads: int = Field(default=24, ge=1)
    key_heads: int = Field(default=24, ge=1)
    head_dim: int = 128
    length: int = Field(default=8192, ge=1)
    context: int = Field(default=0, ge=0)
    copies: int = Field(default=0, ge=0)
    repeats: int = Field(default=10, ge=1)
    math_heads: int = Field(default=4, ge=0)
    tile: tuple[int, int, int, int] | None = None


Run = Callable[[], object]
ROWS = (
    *("forward", "backward", "peak", "saved"),
    *("forward_math", "backward_math", "peak_math", "forward_ratio", "backward_ratio", "error", "error_gradient"),
)


@task("jvp_attention", JvpAttentionOptions, rows=ROWS)
def jvp_attention(context: Context, options: JvpAttentionOptions) -> Outcome:
    """Attention with its tangent on CUDA: time and memory, forward and backward, beside explicit attention."""
    if not torch.cuda.is_available():
        raise ValueError(NEEDS_CUDA)
    if options.tile is not None:
        from omni.nn import jvp_attention_launch as launch

        for tilings in (launch.TILINGS, launch.SMALL_TILINGS):
            tilings[options.head_dim, 2] = launch.Tiling(*options.tile)
    inputs, mask = _inputs(context, options, options.heads, options.key_heads), _mask(options)
    ours = _measure(inputs, mask, "triton", options.repeats)
    measures = [
        Measure("forward", ours["forward"], "ms"),
        Measure("backward", ours["backward"], "ms"),
        Measure("peak", ours["peak"], "MiB"),
        Measure("saved", ours["saved"], "MiB"),
    ]
    notes = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {options.heads} heads ({options.key_heads} of "
        f"keys) of {options.head_dim}, length {options.length}, context {options.context}, copies {options.copies}; "
        f"medians of {options.repeats}; kernels on bf16, explicit attention computes in float32; peak: above what the "
        "inputs take"
    ]
    if options.math_heads:
        measures += _beside_math(context, options, mask, ours)
    return Outcome(measures, notes=notes)


def _beside_math(
    context: Context, options: JvpAttentionOptions, mask: AttentionMask | None, ours: dict[str, float]
) -> list[Measure]:
    """Explicit attention on a few heads, scaled to all; and how far the kernels are from it in float32."""
    few = _inputs(context, options, options.math_heads, options.math_heads)
    scale = options.heads / options.math_heads
    theirs = _measure(few, mask, "math", options.repeats)
    forward, backward = theirs["forward"] * scale, theirs["backward"] * scale
    one = [x[:, :1] for x in few]
    found, wanted = (_gradients([x.to(dtype) for x in one], mask, backend) for backend, dtype in _PRECISIONS)
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


_PRECISIONS = (("triton", torch.bfloat16), ("math", torch.float32))


def _inputs(context: Context, options: JvpAttentionOptions, heads: int, key_heads: int) -> list[Tensor]:
    """q, k, v, dq, dk, dv, keys and values of the context, and the cotangents of o and do, in bf16."""
    Q, T, D = options.length, options.context, options.head_dim
    query, own, far = (1, heads, Q, D), (1, key_heads, Q, D), (1, key_heads, T, D)
    shapes = (query, own, own, query, own, own, far, far, query, query)
    key = context.key("jvp_attention")
    return [key.fold(n).normal(shape).to("cuda", torch.bfloat16) for n, shape in enumerate(shapes)]


def _mask(options: JvpAttentionOptions) -> AttentionMask | None:
    if options.copies == 0:
        return None
    T, Q = options.context, options.length
    own = torch.arange(Q, device="cuda").expand(1, -1)
    far = torch.zeros(1, T, dtype=torch.int64, device="cuda")
    queries = Fields(own * 0, own * 0 + 1, 1 + own * options.copies // Q)
    return AttentionMask(queries, Fields(far, far, far).then(queries))


def _attend(inputs: list[Tensor], mask: AttentionMask | None, backend: str) -> tuple[Tensor, Tensor]:
    q, k, v, dq, dk, dv, k_context, v_context = inputs[:8]
    return attend_with_tangent(q, k, v, dq, dk, dv, k_context, v_context, mask, backend)


def _gradients(inputs: list[Tensor], mask: AttentionMask | None, backend: str) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs[:8]]
    outputs = _attend(leaves, mask, backend)
    return [*outputs, *torch.autograd.grad(outputs, leaves, inputs[8:])]


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
    backward = partial(torch.autograd.grad, outputs, leaves, inputs[8:], retain_graph=True)
    backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - start
    return {
        "forward": _milliseconds(partial(_attend, leaves, mask, backend), repeats),
        "backward": _milliseconds(backward, repeats),
        "peak": peak / 2**20,
        "saved": saved / 2**20,
    }


def _milliseconds(run: Run, repeats: int) -> float:
    """The median, by CUDA events, after one run that is not counted (kernels compile then)."""
    times = []
    for number in range(repeats + 1):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        torch.cuda.synchronize()
        if number:
            times.append(before.elapsed_time(after))
    return statistics.median(times)
