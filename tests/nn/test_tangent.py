"""Tangents of the refine stream: three forms agree, gradients flow through, copies are independent, memory stays
low."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from layouts import random_batch, small_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import omni.sequence.mask
from omni.losses import BatchFlowCall
from omni.model import Omni
from omni.nn.tangent import Dual, differentiate, lift
from omni.nn.transformer import Block
from omni.objectives import build_objective
from omni.rng import Key

Point = tuple[Tensor, Tensor, Tensor]


def batch_of(dtype: torch.dtype = torch.float64):  # noqa: ANN201
    """Three documents in two rows, three copies of each of their blocks."""
    batch = random_batch(Key(11).fold("tangent"), num_documents=3, copies=3, rows=2)
    return replace(batch, latents=batch.latents.to(dtype), refine_latents=batch.refine_latents.to(dtype))


def call_of(model: Omni, batch) -> BatchFlowCall:  # noqa: ANN001
    _, memory = model.context(batch)
    beta = 0.3 + 0.7 * torch.arange(batch.num_items, dtype=batch.latents.dtype) / batch.num_items
    return BatchFlowCall(model, batch, memory, beta)


def points(batch) -> tuple[Point, Point]:  # noqa: ANN001
    """(x, t, s) and a direction in all three."""
    dtype, key = batch.latents.dtype, Key(12)
    t = key.uniform((batch.num_items,), dtype) * 0.8 + 0.2
    x, dx = (key.fold(n).normal(tuple(batch.refine_latents.shape), dtype) for n in ("x", "dx"))
    dt, ds = (key.fold(n).normal(tuple(t.shape), dtype) for n in ("dt", "ds"))
    return (x, t, 0.5 * t), (dx, dt, ds)


def whole(call: BatchFlowCall, point: Point, direction: Point) -> tuple[Tensor, Tensor]:
    """The reference: one jvp around the whole network."""

    def function(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        out = call.model.velocity(x, t, s, call.guidance, call.batch.refine, call.batch.item, call.memory)
        assert isinstance(out, Tensor)
        return out

    return torch.func.jvp(function, point, direction)


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.parametrize("weights", ["shared", "separate", "refine"])
def test_three_forms_agree(weights: str) -> None:
    """In a packed batch of several documents and copies: carried = two-pass = whole-model jvp = central differences."""
    settings = {"dtype": torch.float64, "latent_weights": weights}
    model, batch = small_model(attention="math", **settings), batch_of()
    central = small_model(attention="sdpa", tangents="central", **settings)
    call, (point, direction) = call_of(model, batch), points(batch)
    value, rate = whole(call, point, direction)
    carried = call.with_derivative(*point, *direction)
    two_pass = call.derivative(*point, *direction)
    assert two_pass.grad_fn is None and carried[0].grad_fn is not None and carried[1].grad_fn is not None
    assert far(carried[0], value) < 1e-10 and far(carried[1], rate) < 1e-10 and far(two_pass, rate) < 1e-10
    mask = batch.item >= 0
    other = call_of(central, batch)
    for found in (other.derivative(*point, *direction), other.with_derivative(*point, *direction)[1]):
        assert far(found[mask], rate[mask]) < 1e-6
    wrong = call.derivative(*point, direction[0], direction[1], -direction[2])
    assert far(wrong[mask], rate[mask]) > 1e-3


def test_central_differences_in_float32_and_with_another_step() -> None:
    batch = batch_of(torch.float32)
    point, direction = points(batch)
    wanted = call_of(small_model(), batch).derivative(*point, *direction)
    for step, bound in ((None, 5e-3), (0.3, 1e3)):
        found = call_of(small_model(tangents="central", tangent_step=step), batch).derivative(*point, *direction)
        assert far(found, wanted) < bound
    assert far(found, wanted) > 5e-2  # control: a step of 0.3 is not a derivative


def test_central_differences_hold_under_autocast() -> None:
    batch = batch_of(torch.float32)
    point, direction = points(batch)
    wanted = call_of(small_model(), batch).derivative(*point, *direction)
    call = call_of(small_model(tangents="central"), batch)
    with torch.autocast("cpu", torch.bfloat16):
        for found in (call.derivative(*point, *direction), call.with_derivative(*point, *direction)[1]):
            assert far(found.float(), wanted) < 0.05  # differences of bfloat16 values have an error of 0.3


def losses(call: BatchFlowCall, point: Point, direction: Point, form: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    """A loss of F and its derivative, with different weights for every element."""
    value, rate = form(call, point, direction)
    a, b = (Key(13).fold(n).normal(tuple(value.shape), torch.float64) for n in "ab")
    mask = (call.batch.item >= 0).unsqueeze(-1)
    return ((value * a + rate.pow(2) + value * rate * b) * mask).sum()


def carried(call: BatchFlowCall, point: Point, direction: Point) -> tuple[Tensor, Tensor]:
    return call.with_derivative(*point, *direction)


def gradients(model: Omni, form: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Of `losses`, for every weight, the context's included."""
    batch = batch_of()
    model.zero_grad()
    losses(call_of(model, batch), *points(batch), form).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradients_through_the_tangent() -> None:
    """Reverse over layer-wise forward = reverse over whole-model forward = central differences of the loss."""
    model, batch = small_model(dtype=torch.float64, attention="math"), batch_of()
    found, wanted = gradients(model, carried), gradients(model, whole)
    assert found.keys() == wanted.keys() and {"flow.clean.weight", "flow.gap.up.weight"} < found.keys()
    assert max(far(found[n], wanted[n]) for n in found if wanted[n].abs().max() > 0) < 1e-10
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    along = {n: Key(14).fold(n).normal(tuple(p.shape), torch.float64) for n, p in weights.items()}
    h, values = 1e-6, []
    for sign in (1, -1):
        model.load_state_dict({n: weights[n] + sign * h * along[n] for n in weights})
        with torch.no_grad():
            values.append(losses(call_of(model, batch), *points(batch), carried))
    slope = sum((found[n] * along[n]).sum() for n in found)
    assert far(slope, (values[0] - values[1]) / (2 * h)) < 1e-6
    cut = sum((g * along[n]).sum() for n, g in gradients(model, detached).items())
    assert far(cut, (values[0] - values[1]) / (2 * h)) > 1e-3  # control: the tangent's share is large


def test_streamed_attention_has_the_same_tangents_and_gradients() -> None:
    """`tangents="streamed"`: the model's derivative and the gradients through it, as with explicit softmax."""
    batch = batch_of()
    plain = small_model(dtype=torch.float64, attention="math")
    streamed = small_model(dtype=torch.float64, attention="math", tangents="streamed")
    one, other = (call_of(model, batch).derivative(*sum(points(batch), ())) for model in (plain, streamed))
    assert far(other[batch.item >= 0], one[batch.item >= 0]) < 1e-10
    found, wanted = gradients(streamed, carried), gradients(plain, carried)
    assert max(far(found[n], wanted[n]) for n in wanted if wanted[n].abs().max() > 0) < 1e-10


def detached(call: BatchFlowCall, point: Point, direction: Point) -> tuple[Tensor, Tensor]:
    return call(*point), call.derivative(*point, *direction)


def test_there_is_no_tangent_between_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that see one another would have tangents of one another. With the copy in the mask these are 0."""
    model, batch = small_model(dtype=torch.float64), batch_of()
    (x, t, s), (dx, dt, ds) = points(batch)
    first = batch.item == 0
    only = (dx * first.unsqueeze(-1), dt * (torch.arange(len(t)) == 0), ds * (torch.arange(len(t)) == 0))

    def moved() -> tuple[float, float]:
        rate = call_of(model, batch).derivative(x, t, s, *only)
        return float(rate[first].abs().max()), float(rate[batch.item > 0].abs().max())

    assert moved()[0] > 0 and moved()[1] == 0
    real = omni.sequence.mask.visible

    def leaky(q_document, q_block, q_copy, q_rank, k_document, k_block, k_copy, k_rank):  # noqa: ANN001, ANN202
        same = (q_document == k_document) & (q_block == k_block) & (q_copy != 0) & (k_copy != 0)
        return real(q_document, q_block, q_copy, q_rank, k_document, k_block, k_copy, k_rank) | same

    monkeypatch.setattr(omni.sequence.mask, "visible", leaky)
    assert moved()[1] > 1e-4


def test_checkpointed_layers_give_the_same_gradients() -> None:
    model = small_model(dtype=torch.float64)
    wanted, calls = gradients(model, carried), 0

    def counted(block: Block, *arguments: object) -> object:
        nonlocal calls
        calls += 1
        return Block.forward(block, *arguments)  # type: ignore[arg-type]

    for block in model.transformer.blocks:
        block.forward = partial(checkpoint, partial(counted, block), use_reentrant=False)  # type: ignore[method-assign]
    found = gradients(model, carried)
    assert calls == 2 * 2 * len(model.transformer.blocks)  # context and refine, forward and again in backward
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


def saved_bytes(step: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that autograd saves in a forward pass until the backward."""
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step()
    loss.backward()
    return total


def test_two_pass_saves_no_more_activations_than_a_step_without_tangents() -> None:
    model = small_model().train()
    batch = batch_of(torch.float32)
    point, direction = points(batch)

    def plain() -> Tensor:
        return call_of(model, batch)(*point).pow(2).sum()

    def two_pass() -> Tensor:
        call = call_of(model, batch)
        return (call(*point) - call.derivative(*point, *direction)).pow(2).sum()

    def through() -> Tensor:
        value, rate = call_of(model, batch).with_derivative(*point, *direction)
        return (value - rate).pow(2).sum()

    one, two, three = map(saved_bytes, (plain, two_pass, through))
    assert two < 1.1 * one < three


@pytest.mark.parametrize("name", ["mean_flow", "terminal_velocity"])
def test_autocast_loses_no_gradient(name: str) -> None:
    """A derivative without a graph precedes a forward with one; they must not share casts of weights."""
    model, batch, grads = small_model().train(), random_batch(Key(2).fold("train"), num_documents=2), []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            [term] = model(batch, [build_objective(name)], Key(9)).values()
        (term.sum / term.count).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    exact, low = grads
    assert exact.keys() == low.keys()
    flat = [torch.cat([g[n].flatten() for n in exact]) for g in grads]
    assert float((flat[0] - flat[1]).norm() / flat[0].norm()) < 0.1


def test_lift_treats_other_arguments_as_constants() -> None:
    a, b = torch.tensor(2.0), torch.tensor(3.0)
    assert float(lift(torch.mul, a, b)) == 6.0
    assert tuple(map(float, lift(torch.mul, Dual(a, torch.tensor(1.0)), b))) == (6.0, 3.0)
    both = differentiate(partial(lift, torch.mul), (a, b), (torch.tensor(1.0), torch.tensor(10.0)), "carried")
    assert tuple(map(float, both)) == (6.0, 23.0)
