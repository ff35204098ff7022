"""Attention with its tangent: values, tangents and all gradients equal autograd's, in linear memory; refusals.

The Triton kernels run in Triton's interpreter, in a process of its own (this file as a script): the interpreter must be
enabled before Triton is first imported, and torch imports it in several places.

Error measure: root mean square of the difference over the root mean square of the exact result. Rounding the exact
result to bfloat16 gives 1.7e-3; `peak` divides by the largest magnitude of the exact result instead.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import random_batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eval.suite import main as evaluate
from omni.nn.attention import jvp as jvp_attention
from omni.nn.attention import jvp_inputs
from omni.nn.attention.backends import AttentionMask
from omni.nn.attention.jvp import attend_with_tangent
from omni.rng import Key
from omni.sequence.mask import Fields

NAMES = "q k v dq dk dv k_context v_context".split()
RESULTS = ["o", "do", *(f"gradient of {name}" for name in NAMES)]
Mask = AttentionMask | Tensor | None


def draw(R: int, H: int, G: int, Q: int, T: int, D: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The eight inputs, and the cotangents of o and do, as float64 values exact in `dtype`. T = 0: no context."""
    query, own, context = (R, H, Q, D), (R, G, Q, D), (R, G, T, D)
    shapes = [query, own, own, query, own, own, context, context, query, query]
    return [Key(7).fold(n).normal(shape, torch.float64).to(dtype).double() for n, shape in enumerate(shapes)]


def oracle(q, k, v, dq, dk, dv, k_context, v_context, mask: Mask) -> tuple[Tensor, Tensor]:  # noqa: ANN001
    """torch.func.jvp of explicit softmax attention."""
    boolean = mask.boolean() if isinstance(mask, AttentionMask) else mask

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = torch.cat([k_context, k], 2), torch.cat([v_context, v], 2)
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (keys, values))
        scores = q @ keys.mT / math.sqrt(q.shape[-1])
        if boolean is None:
            return scores.softmax(-1) @ values
        weights = torch.where(boolean, scores, -1e300).softmax(-1)
        return torch.where(boolean, weights, 0.0) @ values

    return torch.func.jvp(attention, (q, k, v), (dq, dk, dv))


def results(function: Callable[..., tuple[Tensor, Tensor]], drawn: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """o, do and the eight gradients, in float64."""
    inputs = [x.to(dtype).requires_grad_() for x in drawn[:8]]
    outputs = function(*inputs)
    assert all(x.dtype == dtype for x in outputs)
    gradients = torch.autograd.grad(outputs, inputs, [x.to(dtype) for x in drawn[8:]])
    return [x.detach().double() for x in (*outputs, *gradients)]


def errors(backend: str, drawn: list[Tensor], mask: Mask, dtype: torch.dtype) -> tuple[dict[str, float], float]:
    """The error of every result, and the largest `peak` error; see the module docstring."""

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        k_context, v_context = inputs[6:]
        return attend_with_tangent(*inputs[:6], k_context, v_context, mask, backend)

    wanted = results(lambda *inputs: oracle(*inputs, mask), drawn, torch.float64)
    found = results(function, drawn, dtype)
    pairs = [(n, a, b) for n, a, b in zip(RESULTS, found, wanted, strict=True) if b.numel()]
    zero = [bool(b.norm() < 1e-9) for _, _, b in pairs]  # then the error is absolute
    peaks = [
        float((a - b).pow(2).mean().sqrt() / b.abs().max()) for (_, a, b), z in zip(pairs, zero, strict=True) if not z
    ]
    scaled = {name: float((a - b).norm() / (1 if z else b.norm())) for (name, a, b), z in zip(pairs, zero, strict=True)}
    return scaled, max(peaks, default=0.0)


def random_layout(seed: int, context: bool = True) -> tuple[AttentionMask, int, int, int]:
    """The mask of a random batch's refine stream over [context; refine], and rows, queries, context keys."""
    batch = random_batch(Key(seed).fold("attention"), num_documents=3, copies=2)
    queries = batch.refine.fields
    keys = batch.context.fields.then(queries) if context else queries
    R, Q = queries.document.shape
    return AttentionMask(queries, keys), R, Q, keys.document.shape[1] - Q


def random_dense(R: int, Q: int, K: int) -> Tensor:
    """Half of all pairs; the last query sees nothing."""
    mask = Key(8).uniform((R, 1, Q, K)) < 0.5
    mask[:, :, -1] = False
    return mask


# ---- math and streamed -----------------------------------------------------------------------------------------------

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-3}


@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("backend", ["math", "streamed"])
def test_random_layouts(backend: str, dtype: torch.dtype) -> None:
    """Masks of random batches, context or none, grouped queries; tiles are small, so there are many."""
    for seed in range(2 if dtype == torch.bfloat16 else 4):
        mask, R, Q, T = random_layout(seed, context=seed != 1)
        found, _ = errors(backend, draw(R, 4, 1 + seed % 2, Q, T, 6, dtype), mask, dtype)
        assert max(found.values()) < BOUNDS[dtype], (seed, found)


@pytest.fixture(params=[16, 128])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(jvp_attention.jvp_streamed, "TILE", request.param)
    return request.param


@pytest.mark.parametrize("length", [1, 17, 65, 130])
@pytest.mark.parametrize("kind", ["none", "dense"])
def test_ragged_lengths(kind: str, length: int, tile: int) -> None:
    for T in (0, 3, 70):
        drawn = draw(2, 2, 1, length, T, 5)
        mask = None if kind == "none" else random_dense(2, length, T + length)
        found, _ = errors("streamed", drawn, mask, torch.float64)
        assert max(found.values()) < 1e-10, (T, found)


def test_the_comparison_can_fail() -> None:
    """Control: against the oracle of another mask, or another tangent, every error is large."""
    mask, R, Q, T = random_layout(0)
    drawn = draw(R, 2, 2, Q, T, 6)
    found = results(lambda *x: attend_with_tangent(*x, mask, "streamed"), drawn, torch.float64)
    flipped = [x if n != 4 else -x for n, x in enumerate(drawn)]
    for wrong in (
        results(lambda *x: oracle(*x, None), drawn, torch.float64),
        results(lambda *x: oracle(*x, mask), flipped, torch.float64),
    ):
        assert float((found[1] - wrong[1]).norm() / wrong[1].norm()) > 0.05


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    drawn = draw(1, 2, 1, 5, 4, 6)
    mask = random_dense(1, 5, 9)
    for backend in ("math", "streamed"):
        o, do, grad_q, *_ = results(lambda *x, b=backend: attend_with_tangent(*x, mask, b), drawn, torch.float64)
        assert all(float(x[:, :, -1].abs().max()) == 0 and bool(x.isfinite().all()) for x in (o, do, grad_q))
        assert float(o[:, :, 0].abs().min()) > 0


def test_a_large_common_part_of_keys_and_values_costs_no_accuracy_in_bf16() -> None:
    """Row sums of outputs rounded to bf16 would give the gradient of dq an error of 14% here."""
    drawn = draw(1, 2, 1, 96, 40, 64)
    for n in (1, 2, 4, 6, 7):
        drawn[n] += 4 * Key(9).fold("common", n % 5).normal((64,), torch.float64)
    drawn = [x.bfloat16().double() for x in drawn]
    found, _ = errors("streamed", drawn, None, torch.bfloat16)
    assert max(found.values()) < 2e-3


def test_gradients_of_one_output_or_one_input() -> None:
    """Cotangents of o alone or do alone; only some inputs need a gradient; no graph at all."""
    mask, R, Q, T = random_layout(2)
    drawn = draw(R, 2, 1, Q, T, 4)
    for output in (0, 1):
        for n in (0, 2, 4, 6):
            found, wanted = [], []
            for function, out in ((attend_with_tangent, found), (oracle, wanted)):
                inputs = [x.clone().requires_grad_(i == n) for i, x in enumerate(drawn[:8])]
                result = function(*inputs, mask)[output]
                if result.requires_grad and not (output == 0 and n == 4):
                    out.append(torch.autograd.grad(result, inputs[n], drawn[8])[0])
            assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, wanted, strict=True))
    with torch.no_grad():
        assert attend_with_tangent(*[x.requires_grad_() for x in drawn[:8]], mask)[1].grad_fn is None


# ---- memory ----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def memory(backend: str, length: int) -> tuple[int, int]:
    """Elements of the largest tensor made or saved, and of all saved tensors, at one head of 8."""
    drawn = [x.float() for x in draw(1, 1, 1, length, 0, 8)]
    inputs = [x.requires_grad_() for x in drawn[:6]]
    i = torch.arange(length).expand(1, -1)
    fields = Fields(torch.zeros_like(i), torch.zeros_like(i), 1 + i // (length // 8))  # eight copies
    saved: list[int] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = attend_with_tangent(*inputs, mask=AttentionMask(fields, fields), backend=backend)
        torch.autograd.backward(outputs, drawn[8:])
    return max(largest.elements, *saved), sum(saved)


def test_memory_is_linear_in_the_length() -> None:
    """At 4096 no tensor is length x length; inputs, outputs and two numbers per query are saved."""
    largest, saved = memory("streamed", 4096)
    assert largest <= jvp_inputs.MAX_PREDICATE < 4096 * 4096 / 4
    assert saved == 4096 * (8 * 8 + 2)
    largest, saved = memory("math", 512)  # control: the quadratic form fails
    assert largest >= 512 * 512 and saved > 2 * 512 * 512


def test_hidden_tiles_are_not_computed(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 4 copies of 64 latents, a tile of queries visits only tiles of its own copy."""
    i = torch.arange(256).expand(1, -1)
    fields = Fields(torch.zeros_like(i), torch.zeros_like(i), 1 + i // 64)
    drawn = draw(1, 1, 1, 256, 0, 4)
    met: list[int] = []
    real = jvp_attention.jvp_streamed._walk

    def walk(*arguments: Any) -> Iterator[Any]:
        for found in real(*arguments):
            met.append(1)
            yield found

    monkeypatch.setattr(jvp_attention.jvp_streamed, "_walk", walk)
    for mask, tiles in (
        (AttentionMask(fields, fields), (256 // tile) * max(1, 64 // tile)),
        (None, (256 // tile) ** 2),
    ):
        met.clear()
        attend_with_tangent(*drawn[:6], mask=mask)
        assert len(met) == tiles


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(words: str, *, backend: str = "streamed", **changes: Any) -> None:
    drawn = [x.float() for x in draw(2, 4, 2, 6, 3, 8)]
    arguments = {**dict(zip(NAMES, drawn, strict=False)), "backend": backend, **changes}
    with pytest.raises(ValueError, match=words):
        attend_with_tangent(**arguments)


def test_refusals() -> None:
    some = torch.zeros(2, 2, 6, 8)
    fields = Fields(*(torch.zeros(2, 6, dtype=torch.int64) for _ in range(3)))
    refused("known: math, streamed, triton", backend="flash")
    refused("no dropout, got 0.1", dropout=0.1)
    refused("k_context and v_context", k_context=None)
    refused(r"dk is \(2, 2, 5, 8\)", dk=some[:, :, :5])
    refused("dv is torch.float64", dv=some.double())
    refused("convert first", **{name: some.half() for name in NAMES if "q" not in name}, q=some.half(), dq=some.half())
    refused("not a multiple of 3 key heads", k=torch.zeros(2, 3, 6, 8))
    refused("a dense mask is bool", mask=torch.ones(2, 1, 6, 9))
    refused(r"\(2, 1, 6, 9\)", mask=torch.ones(2, 6, 9, dtype=torch.bool))
    refused(r"keys \(2, 6\)", mask=AttentionMask(fields, fields))


def test_transforms_and_second_derivatives_are_refused() -> None:
    drawn = [x.float() for x in draw(1, 1, 1, 3, 0, 4)][:6]

    def of_q(q: Tensor) -> Tensor:
        return attend_with_tangent(q, *drawn[1:])[0]

    for transform in (
        lambda: torch.func.jvp(of_q, (drawn[0],), (drawn[0],)),
        lambda: torch.func.vmap(of_q)(drawn[0].expand(2, *drawn[0].shape)),
        lambda: torch.func.grad(lambda q: of_q(q).sum())(drawn[0]),
    ):
        with pytest.raises(ValueError, match="q is inside a torch.func transform"):
            transform()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match="q carries a forward-mode tangent"):
        of_q(torch.autograd.forward_ad.make_dual(drawn[0], drawn[0]))
    q = drawn[0].clone().requires_grad_()
    with pytest.raises(ValueError, match="second derivative"):
        torch.autograd.grad(of_q(q).sum(), q, create_graph=True)
    o, do = attend_with_tangent(q, *drawn[1:], backend="math")
    (first,) = torch.autograd.grad(do.sum(), q, create_graph=True)
    assert float(torch.autograd.grad(first.sum(), q)[0].abs().max()) > 0


def test_autocast_gives_its_dtype_and_float32_sums() -> None:
    drawn = draw(1, 2, 1, 40, 20, 8, torch.bfloat16)
    wanted = results(lambda *x: attend_with_tangent(*x), drawn, torch.bfloat16)
    inputs = [x.float().requires_grad_() for x in drawn[:8]]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = attend_with_tangent(*inputs)
        gradients = torch.autograd.grad(outputs, inputs, [x.bfloat16() for x in drawn[8:]])
    assert all(x.dtype == torch.bfloat16 for x in outputs) and all(x.dtype == torch.float32 for x in gradients)
    assert all(torch.equal(a.double(), b) for a, b in zip((*outputs, *gradients), wanted, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error needs a machine without CUDA")
def test_gpu_task_without_cuda_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "suite.toml").write_text('title = "GPU"\ntasks = ["jvp_attention"]\n')
    assert evaluate([str(tmp_path / "suite.toml"), "--html", str(tmp_path / "report.html")]) == 2
    output = capsys.readouterr().err
    assert "this machine has no CUDA device" in output and output.count("\n") == 1


# ---- Triton, in its interpreter --------------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def triton_cases() -> dict[str, tuple[list[Tensor], Mask, torch.dtype]]:
    """Both widths and dtypes; visibility by fields, dense, none; context or none; grouped queries; ragged lengths."""
    mask, R, Q, T = random_layout(5)
    alone, R1, Q1, _ = random_layout(6, context=False)
    float32, bfloat16 = torch.float32, torch.bfloat16
    return {
        "fields": (draw(R, 2, 1, Q, T, 64, float32), mask, float32),
        "fields bfloat16": (draw(R1, 1, 1, Q1, 0, 64, bfloat16), alone, bfloat16),
        "dense, wide": (draw(1, 1, 1, 17, 5, 128, float32), random_dense(1, 17, 22), float32),
        "dense, wide, bfloat16": (draw(1, 2, 1, 33, 40, 128, bfloat16), random_dense(1, 33, 73), bfloat16),
        "all visible": (draw(1, 2, 1, 65, 17, 64, float32), None, float32),
        "one position": (draw(1, 1, 1, 1, 0, 64, float32), None, float32),
        "whole tiles": (draw(1, 2, 1, 64, 64, 64, float32), None, float32),
        "whole tiles, bfloat16": (draw(1, 1, 1, 64, 0, 128, bfloat16), None, bfloat16),
        "a large common part": (common_part(draw(1, 2, 1, 64, 0, 64, bfloat16)), None, float32),
        "a large common part, bfloat16": (common_part(draw(1, 2, 1, 64, 0, 64, bfloat16)), None, bfloat16),
        "the same beside a context, bfloat16": (common_part(draw(1, 2, 1, 33, 40, 64, bfloat16)), None, bfloat16),
    }


def common_part(drawn: list[Tensor]) -> list[Tensor]:
    """Four deviations, equal at all positions and exact in bf16, added to keys, values and the tangents of keys."""
    drawn = list(drawn)
    for same in ((1, 6), (2, 7), (4,)):  # the context's like the own keys'
        part = 4 * Key(9).fold("common", same[0]).normal((drawn[1].shape[-1],), torch.float64)
        for n in same:
            drawn[n] = (drawn[n] + part).bfloat16().double()
    return drawn


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """The output of this file as a script."""
    here = Path(__file__).parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize("case", triton_cases())
def test_triton_equals_the_oracle(case: str, interpreted: dict[str, Any]) -> None:
    """float32: 1e-5. bfloat16: 2e-3 of the largest magnitude, and 3e-3 of the root mean square; of these, rounding the
    result is 1.7e-3, and rounding the weights to operands as much again."""
    found, peak = interpreted[case]
    assert max(found.values()) < (3e-3 if "bfloat16" in case else 1e-5), found
    assert peak < (2e-3 if "bfloat16" in case else 1e-5)
    assert len(found) >= 8  # without those of an empty context


@needs_triton
def test_triton_outside_its_domain(interpreted: dict[str, Any]) -> None:
    assert interpreted["the wrong mask"] > 0.05  # control
    assert "head widths 64 and 128, got 32; use 'streamed'" in interpreted["refused"]
    refused("needs CUDA tensors, got cpu" if "TRITON_INTERPRET" not in os.environ else "widths", backend="triton",
            **{name: torch.zeros(2, 2, 6, 64) for name in NAMES})  # fmt: skip


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", triton_cases())
def test_triton_on_a_gpu(case: str) -> None:
    """The same bounds with the built-in tiles, on a GPU."""
    drawn, mask, dtype = triton_cases()[case]
    if isinstance(mask, AttentionMask):
        sides = ([x if x is None else x.cuda() for x in vars(fields).values()] for fields in (mask.queries, mask.keys))
        mask = AttentionMask(*(Fields(*side) for side in sides))
    elif mask is not None:
        mask = mask.cuda()
    found, peak = errors("triton", [x.cuda() for x in drawn], mask, dtype)
    assert max(found.values()) < (3e-3 if "bfloat16" in case else 1e-5), found
    assert peak < (2e-3 if "bfloat16" in case else 1e-5)


def script() -> None:
    """Every case in the interpreter, as one line of JSON."""
    from omni.nn.attention import jvp_launch

    torch.set_num_threads(1)
    tile = jvp_launch.Tiling
    small = jvp_launch.Tilings(tile(32, 16), tile(32, 32), tile(16, 64), tile(32, 16))  # several tiles of few
    jvp_launch.tilings = lambda _: small
    cases = triton_cases()
    out: dict[str, Any] = {name: errors("triton", *case) for name, case in cases.items()}
    drawn, _, dtype = cases["dense, wide"]
    inputs = [x.to(dtype) for x in drawn[:8]]
    found, wrong = attend_with_tangent(*inputs, backend="triton")[1], oracle(*drawn[:8], cases["dense, wide"][1])[1]
    out["the wrong mask"] = float((found - wrong).norm().detach() / wrong.norm().detach())
    try:
        attend_with_tangent(*(x[..., :32] for x in inputs), backend="triton")
    except ValueError as error:
        out["refused"] = str(error)
    print(json.dumps(out))


if __name__ == "__main__":
    script()
