"""Latents with times of their own and a head for each (MAR): training and sampling compute the same, pass by pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layouts import CHANNELS, PAD, small_model
from scripted import enliven, living
from torch import Tensor

from omni.generation import denoise
from omni.generation.contract import verify
from omni.generation.engine import Engine
from omni.generation.events import BlockStep
from omni.generation.options import GenerationOptions
from omni.model import Omni, OmniConfig
from omni.objectives import build_objective
from omni.rng import Key
from omni.sequence.block_context import BlockContext, of_latents
from omni.sequence.layout import Batch, LatentSpan, Shape, TokenSpan, pack
from omni.sequence.schedule import cosine_known

MASKED = {"kind": "masked", "mask_time": {"kind": "uniform"}}
N = 6  # latents of a picture of 8 x 12 pixels


def batch_of(*grids: tuple[int, int, int], copies: int = 1) -> Batch:
    """Text, then pictures with text between them."""
    spans: list[Any] = [TokenSpan([1, 2], [True] * 2)]
    for n, grid in enumerate(grids):
        spans += [
            LatentSpan(Key(n).normal((grid[0] * grid[1] * grid[2], CHANNELS)), grid, True),
            TokenSpan([3], [True]),
        ]
    shape = [Shape(1, 60, 120)]
    return pack([spans], shape, channels=CHANNELS, pad_id=PAD, copies=copies, uids=[5], fixed_shape=False)[0][0]


def with_head(model: Omni, depth: int | None) -> Omni:
    """A model like it with a head for each latent (depth None: the transformer is the head), in float64, alive."""
    flow = model.config.flow.model_copy(update={"head_depth": depth})
    config = OmniConfig(**{**dict(model.config), "flow": flow, "blocks": BlockContext(unit="latent")})
    made = Omni(config, Key(1)).eval()
    made.tokenizer, made.codec = model.tokenizer, model.codec
    return enliven(made).double()


@pytest.fixture(scope="module")
def plain(tiny_model) -> Omni:  # noqa: ANN001
    return living(tiny_model)


# ---- training -------------------------------------------------------------------------------------------------------


def test_every_latent_is_an_item() -> None:
    batch = batch_of((1, 2, 3), (1, 1, 2), copies=2)
    each = of_latents(batch)
    assert each.num_items == 2 * (6 + 2) == len(set(each.item_names))
    assert torch.equal(each.item >= 0, batch.item >= 0)
    flat = each.item.flatten()
    assert flat[each.item_first].tolist() == list(range(each.num_items))


@pytest.mark.parametrize("name", ["flow_matching", "mean_flow", "improved_mean_flow"])
@pytest.mark.parametrize("depth", [None, 2])
def test_masked_latents_alone_are_in_the_loss(name: str, depth: int | None) -> None:
    model = with_head(small_model(), depth).float()
    batch, objective = batch_of((1, 4, 4), copies=2), build_objective(name, levels=MASKED)
    [terms] = model(batch, [objective], Key(2)).values()
    assert 0.7 * 32 <= terms.count <= 32
    assert terms.sum.isfinite()
    terms.sum.backward()  # type: ignore[operator]
    if depth is not None:
        assert model.flow.head is not None
        for parameter in (model.flow.head.mask, model.flow.head.enter.weight, model.flow.noisy.weight):
            assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0


@torch.no_grad()
def test_the_transformer_reads_known_latents_and_masks() -> None:
    """F of a masked latent changes with known latents and with its own noise, not with the noise of other latents."""
    model, batch = with_head(small_model(), 1), of_latents(batch_of((1, 2, 2)))
    _, memory = model.context(batch)
    t = torch.tensor([0.0, 0.4, 0.9, 0.0], dtype=torch.float64)

    def F(x: Tensor) -> Tensor:
        return model.velocity(x, t, 0.5 * t, torch.ones_like(t), batch.refine, batch.item, memory)[0]

    x = batch.refine_latents.double()
    plain = F(x)
    for changed, same in ((0, []), (1, [2]), (2, [1])):
        moved = x.clone()
        moved[0, changed] += 1
        equal = [n for n in (1, 2) if torch.equal(F(moved)[n], plain[n])]
        assert equal == same


@torch.no_grad()
@pytest.mark.parametrize("depth", [None, 2])
def test_the_derivative_equals_central_differences(depth: int | None) -> None:
    from omni.losses import BatchFlowCall

    model, batch = with_head(small_model(), depth), of_latents(batch_of((1, 2, 2)))
    _, memory = model.context(batch)
    ones = torch.ones(4, dtype=torch.float64)
    call = BatchFlowCall(model, batch, memory, ones)
    t = torch.tensor([0.0, 0.4, 0.9, 0.7], dtype=torch.float64)
    x, speed = batch.refine_latents.double(), 0.5 * t
    dx = Key(3).normal(tuple(x.shape)).double() * speed[batch.item].unsqueeze(-1)
    found = call.derivative(x, t, t - speed, dx, speed, torch.zeros_like(t))
    h = 1e-6
    ahead, behind = (call(x + c * dx, t + c * speed, t - speed) for c in (h, -h))
    central = (ahead - behind) / (2 * h)
    assert float((found - central).abs().max() / central.abs().max()) < 1e-6


@torch.no_grad()
def test_the_head_embeds_scaled_latents() -> None:
    """With scale_input the head embeds x / n, n^2 = (1 - t)^2 + t^2, as the transformer does without a head."""
    flow = with_head(small_model(), 1).flow
    assert flow.head is not None
    width, t = flow.noisy.out_features, torch.tensor([0.5], dtype=torch.float64)
    z, x = (Key(n).normal((1, 1, num)).double() for n, num in enumerate((width, CHANNELS)))
    seen: list[Tensor] = []
    hook = flow.head.enter.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for scaled in (False, True):
        flow.c = flow.c.model_copy(update={"scale_input": scaled})
        flow.of_latents(z, x, t, 0 * t, 1 + 0 * t, None)
    hook.remove()
    torch.testing.assert_close(seen[0], x)
    torch.testing.assert_close(seen[1], x * 2**0.5)


# ---- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 3, 6, 50])
@pytest.mark.parametrize("depth", [None, 2])
@torch.no_grad()
def test_every_call_of_the_engine_equals_the_training_forward(
    plain: Omni, monkeypatch: pytest.MonkeyPatch, depth: int | None, rounds: int
) -> None:
    model = with_head(plain, depth)
    calls: list[tuple[Any, Tensor]] = []
    velocities = denoise._velocities

    def watched(runtime: Any, found: Tensor, noisy: Any, betas: Any) -> Tensor:
        calls.append((noisy[0], velocities(runtime, found, noisy, betas)))
        return calls[-1][1]

    monkeypatch.setattr(denoise, "_velocities", watched)
    refine, passes = model.transformer.refine, []

    def counted(*arguments: Any) -> Any:
        passes.append(1)
        return refine(*arguments)

    monkeypatch.setattr(model.transformer, "refine", counted)
    options = GenerationOptions(
        steps=2, rounds=rounds, force_image=True, image_size=(8, 12), max_images=1, max_tokens=1
    )
    events = list(Engine(model).stream("draw", options))
    steps = [event for event in events if isinstance(event, BlockStep)]
    known = cosine_known(N, min(rounds, N))
    assert len(steps) == len(known) and len(calls) == 2 * len(known)
    assert len(passes) == len(known) * (2 if depth is None else 1)  # a head reads the same states in all its steps
    monkeypatch.undo()
    from omni.document import Document, Image, Role, Text

    picture = Image(torch.zeros(8, 12, 3, dtype=torch.uint8), Role.ASSISTANT, supervise=True)
    spans = model.spans(Document((Text("draw"), picture)))
    [batch], _ = pack([spans], [Shape(1, 100, 50)], channels=48, pad_id=0, fixed_shape=False)
    batch = of_latents(batch)
    _, memory = model.context(batch)
    for block, F in calls:
        t, s = torch.tensor(block.each).unbind(1)
        wanted = model.velocity(block.x[None], t, s, torch.ones(N), batch.refine, batch.item, memory)[0]
        torch.testing.assert_close(F[0], wanted, rtol=0, atol=1e-10)
    counts = [sum(t == 0 for t, _ in block.each) for block, _ in calls[::2]]
    assert counts == [0, *known[:-1]]


def test_latents_that_wait_are_noise_at_time_one(plain: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """start_time scales the noise of the latents of a round; the others are shown at t = 1, so they are whole noise."""
    calls, velocities = [], denoise._velocities

    def watched(runtime: Any, found: Tensor, noisy: Any, betas: Any) -> Tensor:
        calls.append(noisy[0])
        return velocities(runtime, found, noisy, betas)

    monkeypatch.setattr(denoise, "_velocities", watched)
    options = GenerationOptions(
        steps=1, rounds=2, start_time=0.5, force_image=True, image_size=(8, 12), max_images=1, max_tokens=1
    )
    Engine(with_head(plain, None)).generate("draw", options)
    noise = denoise.block_noise(Key(0), 0, 0, (N, 48)).double()
    first = calls[0]
    assert sorted({t for t, _ in first.each}) == [0.5, 1.0]
    for n, (t, _) in enumerate(first.each):
        torch.testing.assert_close(first.x[n], t * noise[n], rtol=0, atol=1e-6)


def test_noise_on_the_way_is_that_of_the_jump_and_the_latent(plain: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """restart: x_s = (1 - s) (x - t F) + s eps, eps keyed by the jump."""
    calls, velocities = [], denoise._velocities

    def watched(runtime: Any, found: Tensor, noisy: Any, betas: Any) -> Tensor:
        calls.append((noisy[0], velocities(runtime, found, noisy, betas)[0]))
        return calls[-1][1][None]

    monkeypatch.setattr(denoise, "_velocities", watched)
    options = GenerationOptions(
        steps=2, rounds=2, sampler="restart", force_image=True, image_size=(8, 12), max_images=1, max_tokens=1
    )
    Engine(with_head(plain, 1)).generate("draw", options)
    (before, F), (after, _) = calls[:2]
    moved = [n for n, (t, _) in enumerate(after.each) if t == 0.5]
    noise = denoise.block_noise(Key(0), 0, 0, (N, 48), 0).double()
    assert 0 < len(moved) < N
    torch.testing.assert_close(after.x[moved], 0.5 * (before.x - F + noise)[moved], rtol=0, atol=1e-6)


def test_verify_holds(plain: Omni) -> None:
    assert all(check.holds for check in verify(with_head(plain, 1)))


def test_rounds_and_guidance_of_many_requests(plain: Omni) -> None:
    """Each reply equals that of the request alone, with two guidance branches."""
    model = with_head(plain, 1)
    options = GenerationOptions(
        steps=2, rounds=3, guidance=2.0, force_image=True, image_size=(8, 12), max_images=1, max_tokens=1
    )
    together = Engine(model).generate_batch(["a", "b b", "c"], options, seeds=[1, 2, 3])
    for prompt, seed, reply in zip(["a", "b b", "c"], [1, 2, 3], together, strict=True):
        alone = Engine(model).generate_batch([prompt], options, seeds=[seed])[0]
        assert alone.images[0].tobytes() == reply.images[0].tobytes()
    again = Engine(model).generate_batch(["a"], options, seeds=[4])[0]
    assert again.images[0].tobytes() != together[0].images[0].tobytes()


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_head_needs_masked_times() -> None:
    model = with_head(small_model(), 1).float()
    with pytest.raises(ValueError, match="sees latents as known or masked; give levels = {kind = 'masked'"):
        model(batch_of((1, 2, 2)), [build_objective("flow_matching", levels={"kind": "independent"})], Key(0))
    with pytest.raises(ValueError, match="latents of one block read one another is trained with joint times"):
        model(batch_of((1, 2, 2)), [build_objective("flow_matching")], Key(0))
    with pytest.raises(ValueError, match="unit = 'latent' with reads = 'all' is not implemented"):
        BlockContext(unit="latent", reads="all")
