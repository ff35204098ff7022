"""The flow head: one F for every parametrisation, its identities, its derivatives, and its precision in bf16."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from gaussian import PLANE
from layouts import random_batch, small_model
from torch import Tensor

from omni.config import build
from omni.heads import FlowHead, FlowHeadConfig
from omni.heads.flow import Parametrisation, ScalarEmbedding, average_velocity
from omni.losses import BatchFlowCall
from omni.model import Omni
from omni.rng import Key

ALL: list[Parametrisation] = ["velocity", "simple_edm", "x"]
# t and every s <= t, with the ends of both
TIMES = [(t, s) for t in (0.05, 0.3, 0.5, 0.994, 1.0) for s in (0.0, 0.02, 0.3, 0.5, 0.994, 1.0) if s <= t]


def modelled(dtype: torch.dtype = torch.float64, **flow: object) -> Omni:
    """A small model without zero parts, with another flow head."""
    plain = small_model(dtype=dtype)
    config = plain.config.model_copy(update={"flow": plain.config.flow.model_copy(update=flow)})
    model = Omni(config, Key(0)).to(dtype).eval()
    model.load_state_dict(plain.state_dict())
    return model


def calling(model: Omni, dtype: torch.dtype = torch.float64) -> tuple[BatchFlowCall, Tensor, Key]:
    batch = random_batch(Key(11).fold("head"), num_documents=3, copies=3, rows=2)
    with torch.no_grad():
        batch = replace(batch, latents=batch.latents.to(dtype), refine_latents=batch.refine_latents.to(dtype))
        _, memory = model.context(batch)
    x = Key(12).fold("x").normal(tuple(batch.refine_latents.shape), torch.float64).to(dtype)
    return BatchFlowCall(model, batch, memory, torch.ones(batch.num_items)), x, Key(12)


def jumped(output: Tensor, x: Tensor, t: float, s: float, parametrisation: Parametrisation) -> Tensor:
    return x + (s - t) * average_velocity(output, x, torch.tensor(t, dtype=torch.float64), parametrisation)


# ---- identities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "s"), TIMES)
def test_jumps_are_the_published_ones(t: float, s: float) -> None:
    """c_skip x + c_out G of each parametrisation equals x + (s - t) F, to 1e-12, for every s."""
    x, output = (Key(0).fold(name).normal((100,), torch.float64) for name in ("x", "output"))
    n = math.hypot(1 - t, t)
    published: dict[Parametrisation, tuple[float, float]] = {
        "velocity": (1.0, -(t - s)),
        "simple_edm": (((1 - t) * (1 - s) + t * s) / n**2, -((1 - s) * t - (1 - t) * s) / n),
        "x": (s / t, 1 - s / t),
    }
    for name, (skip, out) in published.items():
        assert float((jumped(output, x, t, s, name) - (skip * x + out * output)).abs().max()) < 1e-12, name
        if s < t:  # control: another skip or sign is another jump
            assert float((jumped(output, x, t, s, name) - (skip * x - out * output)).abs().max()) > 1e-3, name


def test_jumps_end_where_they_start_at_s_equal_to_t() -> None:
    x, output = (Key(0).fold(name).normal((100,), torch.float64) for name in ("x", "output"))
    for name in ALL:
        for t in (0.0, 0.01, 0.5, 1.0):
            assert torch.equal(jumped(output, x, t, t, name), x)


@pytest.mark.parametrize("t", [0.06, 0.4, 0.9, 0.9999])
def test_the_denoiser_of_edm_is_simple_edm_with_the_other_sign(t: float) -> None:
    """D(y, eta) = c_skip y + c_out G with sigma_data = 1 and y = x / (1 - t), as F: x0^ = x - t F."""
    x, output = (Key(0).fold(name).normal((100,), torch.float64) for name in ("x", "output"))
    eta = t / (1 - t)
    denoised = (x / (1 - t)) / (eta**2 + 1) + eta / math.sqrt(eta**2 + 1) * output
    assert float((jumped(-output, x, t, 0.0, "simple_edm") - denoised).abs().max()) < 1e-12
    assert float((jumped(output, x, t, 0.0, "simple_edm") - denoised).abs().max()) > 0.01


def test_outputs_that_give_the_exact_map() -> None:
    """Each parametrisation can be exact: solved for G at the exact F of a Gaussian, it returns that F."""
    x = Key(0).normal((50, 2), torch.float64)
    for t, s in TIMES:
        time, end = (torch.tensor(value, dtype=torch.float64) for value in (t, s))
        F = PLANE.average(x, time, end)
        n = torch.hypot(1 - time, time)
        outputs = {"velocity": F, "simple_edm": n * F - (2 * time - 1) / n * x, "x": x - time * F}
        for name in ALL:
            assert float((average_velocity(outputs[name], x, time, name) - F).abs().max()) < 1e-12


def test_x_is_clamped_near_the_data() -> None:
    """Below min_time F = (x - G) / min_time: finite and continuous; above it exact."""
    x, output = torch.tensor([2.0]).double(), torch.tensor([1.0]).double()
    F = [float(average_velocity(output, x, torch.tensor(t).double(), "x", 0.05)) for t in (0.0, 0.049999, 0.05, 0.1)]
    assert [round(f, 6) for f in F] == [20.0, 20.0, 20.0, 10.0]
    assert float(average_velocity(output, x, torch.tensor(0.0).double(), "x", 0.5)) == 2.0


# ---- the head and the model ----------------------------------------------------------------------------------------


def before(head: FlowHead, hidden: Tensor, x: Tensor, t: Tensor, s: Tensor, beta: Tensor, item: Tensor) -> list[Tensor]:
    """The head before parametrisations, written out: embedding, condition, F."""

    def embedding(part: ScalarEmbedding, value: Tensor) -> Tensor:
        octaves = torch.linspace(math.log(0.25), math.log(head.c.max_frequency), head.c.num_frequencies)
        angle = value[:, None] * (octaves.exp() * head.c.time_scale).to(value.dtype)
        features = torch.cat([angle.cos(), angle.sin()], -1).to(part.up.weight.dtype)
        return part.down(torch.nn.functional.silu(part.up(features)))

    condition = embedding(head.time, t) + embedding(head.gap, t - s) + embedding(head.guidance, beta)
    vectors = head.modulation(torch.nn.functional.silu(condition)).to(hidden.dtype)
    scale, shift = vectors[item.clamp(min=0)].chunk(2, -1)
    return [head.noisy(x), condition, head.velocity(hidden * (1 + scale) + shift)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_velocity_equals_the_head_before_parametrisations_to_the_bit(dtype: torch.dtype) -> None:
    head = FlowHead(16, FlowHeadConfig(channels=4, num_frequencies=8))
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(Key(1).fold(name).normal(tuple(parameter.shape)) * 0.3)
    head = head.to(dtype)
    hidden, x = (Key(2).fold(n).normal((2, 6, w)).to(dtype) for n, w in (("hidden", 16), ("x", 4)))
    t = torch.tensor([1.0, 0.6, 0.2], dtype=torch.promote_types(dtype, torch.float32))
    item = torch.tensor([[0, 0, 1, 1, -1, -1], [2, 2, 2, 2, 2, -1]])
    condition = head.condition(t, 0.3 * t, torch.ones_like(t))
    found = [head.embed(x, t, item), condition, head.read(hidden, condition, item, x, t)]
    wanted = before(head, hidden, x, t, 0.3 * t, torch.ones_like(t), item)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    other = FlowHead(16, FlowHeadConfig(channels=4, num_frequencies=8, parametrisation="simple_edm", scale_input=True))
    other.to(dtype).load_state_dict(head.state_dict())
    assert not torch.equal(other.read(hidden, condition, item, x, t), wanted[2])
    assert not torch.equal(other.embed(x, t, item), wanted[0])


@pytest.mark.parametrize("parametrisation", ALL)
def test_every_position_gets_the_time_of_its_item(parametrisation: Parametrisation) -> None:
    """F of the packed batch is the affine function of G, item by item; c_in is each item's own too."""
    models = [modelled(parametrisation=p, scale_input=True) for p in ("velocity", parametrisation)]
    (call, x, key), (other, *_) = (calling(model) for model in models)
    t = key.fold("t").uniform((call.batch.num_items,), torch.float64) * 0.9 + 0.1
    with torch.no_grad():
        output, F = call(x, t, 0.3 * t), other(x, t, 0.3 * t)
    for item in range(call.batch.num_items):
        mine = call.batch.item == item
        wanted = average_velocity(output[mine], x[mine], t[item], parametrisation)
        assert float((F[mine] - wanted).abs().max()) < 1e-12


def test_scaled_input_is_the_network_at_a_scaled_x() -> None:
    (plain, x, _), (scaled, *_) = (calling(modelled(scale_input=on)) for on in (False, True))
    for time in (0.1, 0.5, 1.0):
        t = torch.full((plain.batch.num_items,), time, dtype=torch.float64)
        with torch.no_grad():
            wanted = plain(x / math.hypot(1 - time, time), t, 0.5 * t)
            assert float((scaled(x, t, 0.5 * t) - wanted).abs().max()) < 1e-12
            assert (float((scaled(x, t, 0.5 * t) - plain(x, t, 0.5 * t)).abs().max()) > 1e-3) == (time < 1)


@pytest.mark.parametrize("scale_input", [False, True])
@pytest.mark.parametrize("parametrisation", ALL)
def test_derivatives_equal_central_differences(parametrisation: Parametrisation, scale_input: bool) -> None:
    """In x, t and s together, float64; below min_time too. Both forms that objectives use."""
    model = modelled(parametrisation=parametrisation, scale_input=scale_input)
    call, x, key = calling(model)
    t = key.fold("t").uniform((call.batch.num_items,), torch.float64) * 0.8 + 0.15
    t[0] = 0.03  # "x" is clamped there
    s, dt, ds = 0.5 * t, torch.ones_like(t), -0.3 * torch.ones_like(t)
    dx, h = key.fold("dx").normal(tuple(x.shape), torch.float64), 1e-6
    with torch.no_grad():
        ends = [call(x + sign * h * dx, t + sign * h * dt, s + sign * h * ds) for sign in (1, -1)]
        wanted, value = (ends[0] - ends[1]) / (2 * h), call(x, t, s)
    mask = call.batch.item >= 0
    for found in (call.derivative(x, t, s, dx, dt, ds), call.with_derivative(x, t, s, dx, dt, ds)[1].detach()):
        assert float((found - wanted)[mask].abs().max()) < 1e-6 * float(wanted[mask].abs().max())
    assert float((call.with_derivative(x, t, s, dx, dt, ds)[0].detach() - value)[mask].abs().max()) < 1e-12
    if parametrisation != "velocity":  # control: the part outside of the network is not zero
        without = call.derivative(x, t, s, dx, 0 * dt, ds)
        assert float((without - wanted)[mask].abs().max()) > 1e-3


@pytest.mark.parametrize("parametrisation", ALL)
def test_a_new_model_has_the_affine_part_only(parametrisation: Parametrisation) -> None:
    """At initialisation G = 0, so F is its affine part: finite, and 0 for velocity."""
    config = modelled(parametrisation=parametrisation).config
    model = Omni(config, Key(3)).double().eval()
    call, x, _ = calling(model)
    for time in (0.0, 1e-3, 0.5, 1.0):
        t = torch.full((call.batch.num_items,), time, dtype=torch.float64)
        with torch.no_grad():
            F = call(x, t, 0 * t)
        wanted = average_velocity(torch.zeros_like(x), x, t[0], parametrisation)
        assert torch.isfinite(F).all() and float((F - wanted)[call.batch.item >= 0].abs().max()) < 1e-12


# ---- half precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time_scale", [1.0, 1000.0])
@pytest.mark.parametrize("parametrisation", ALL)
def test_bf16_is_finite_everywhere(parametrisation: Parametrisation, time_scale: float) -> None:
    """F, its derivative and the gradients of both, in bf16 with float32 times."""
    flow = {"parametrisation": parametrisation, "time_scale": time_scale, "scale_input": True}
    model = modelled(torch.bfloat16, **flow)
    call, x, key = calling(model, torch.bfloat16)
    dx = key.fold("dx").normal(tuple(x.shape)).bfloat16()
    pairs = [(time, gap) for time in (0.0, 1e-3, 0.5, 0.994, 1.0) for gap in (0.0, 1e-3, 0.2, 1.0)]
    for first in range(0, len(pairs), call.batch.num_items):
        t, gap = torch.tensor([pairs[(first + n) % len(pairs)] for n in range(call.batch.num_items)]).T
        s = (t - gap).clamp(min=0)
        F, rate = call.with_derivative(x, t, s, dx, torch.ones_like(t), torch.zeros_like(t))
        assert F.dtype == torch.bfloat16 and torch.isfinite(F).all() and torch.isfinite(rate).all()
        (F.float().square().mean() + rate.float().square().mean()).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_time_embeddings_survive_bf16_weights() -> None:
    """Frequencies stay float32 when the model is cast: at scale 1000 rounding would change the embeddings."""
    config = FlowHeadConfig(channels=4, num_frequencies=32, time_scale=1000.0)
    full = ScalarEmbedding(16, config, config.time_scale)
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            parameter.copy_((Key(1).fold(name).normal(tuple(parameter.shape)) * 0.3).bfloat16())
    half = ScalarEmbedding(16, config, config.time_scale)
    half.load_state_dict(full.state_dict())
    t = torch.tensor([0.3, 0.994, 1.0])
    with torch.no_grad():
        wanted, found = full(t), half.bfloat16()(t).float()
    assert float((found - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
    rounded = torch.linspace(math.log(0.25), math.log(16.0), 32).exp() * 1000
    angle = t[:, None] * rounded.bfloat16().float()
    spoiled = full.down(torch.nn.functional.silu(full.up(torch.cat([angle.cos(), angle.sin()], -1)))).detach()
    assert float((spoiled - wanted).abs().max()) > 0.3 * float(wanted.abs().max())


def test_scale_1000_separates_nearly_equal_times() -> None:
    """IMM's r and t: .994 and 1e-4 below it, in bf16. At scale 1, which derivatives in time need, they are equal."""
    moved = {}
    for scale in (1.0, 1000.0):
        embedding = ScalarEmbedding(16, FlowHeadConfig(num_frequencies=16, time_scale=scale), scale).bfloat16()
        with torch.no_grad():
            for name, parameter in embedding.named_parameters():
                parameter.copy_(Key(1).fold(name).normal(tuple(parameter.shape)) * 0.3)
            a, b = embedding(torch.tensor([0.994, 0.9939])).float()
        moved[scale] = float((a - b).abs().max() / a.abs().max())
    assert moved[1000.0] > 0.2 > 0.01 > moved[1.0], moved


def test_guidance_is_not_a_time() -> None:
    """time_scale does not change the guidance embedding."""
    heads = [FlowHead(16, FlowHeadConfig(channels=4, num_frequencies=8, time_scale=scale)) for scale in (1.0, 1000.0)]
    heads[1].load_state_dict(heads[0].state_dict())
    one, zero = torch.ones(1), torch.zeros(1)
    assert torch.equal(*(head.guidance(0.7 * one) for head in heads))
    assert not torch.equal(*(head.time(0.7 * one) for head in heads))
    assert torch.equal(*(head.condition(zero, zero, one) for head in heads))


def test_configuration_is_checked() -> None:
    for data, message in (
        ({"parametrisation": "edm"}, "parametrisation = 'edm'"),
        ({"time_scale": 0}, "time_scale = 0"),
        ({"min_time": 0.0}, "min_time = 0.0"),
        ({"choices": ["a", "b"]}, r"choices = \['a', 'b'\] is not supported by this version"),
        ({"parametrization": "x"}, "did you mean 'parametrisation'"),
    ):
        with pytest.raises(ValueError, match=message):
            build(data, FlowHeadConfig, "heads.flow")


def test_format_1_without_choices_is_read() -> None:
    assert build({"channels": 12, "choices": [], "choice_bits": 8}, FlowHeadConfig, "x") == FlowHeadConfig(channels=12)
