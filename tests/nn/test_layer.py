"""One definition of a layer: every variant of a spec is equal in context, refine, tangents and decoding."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from histories import histories_of, read, text
from layouts import random_batch, small_model
from torch import Tensor

import omni.nn.layer
import omni.nn.transformer
from omni.config import build
from omni.generation.contract import EXACT, verify
from omni.losses import BatchFlowCall
from omni.model import Omni, OmniConfig
from omni.nn.declare import declarations
from omni.nn.layer import SERVED, LayerSpec
from omni.nn.native_step import NATIVE, CompiledStep
from omni.nn.transformer import TransformerConfig
from omni.nn.transformer_config import WEIGHTS_SERVED
from omni.rng import Key
from omni.sequence.positions import RotarySpec, rotary_table

VARIANTS: dict[str, dict[str, Any]] = {
    "qkv bias": {"qkv_bias": True},
    "out bias": {"out_bias": True, "norm_placement": "after"},
    "MLP bias": {"mlp_bias": True},
    "no QK-norm": {"qk_norm": "none"},
    "norm after": {"norm_placement": "after"},
    "norms before and after, offset": {"norm_placement": "both", "norm_offset": 1.0},
    "exact GELU": {"activation": "gelu"},
    "GELU by tanh": {"activation": "gelu_tanh", "latent_weights": "separate"},
    "residual scale": {"residual_scale": 0.22, "latent_weights": "refine"},
    "rotary sections": {"rotary": RotarySpec(layout="sections", sections=(2, 1, 1))},
    "interleaved rotary sections": {"head_dim": 16, "rotary": RotarySpec(layout="interleaved", sections=(6, 1, 1))},
    "QK-norm over the width": {"qk_norm": "width", "norm_placement": "after"},
    "scale and cap of scores": {"attention_scale": 0.2, "attention_cap": 1.5, "latent_weights": "refine"},
    "window": {"window": 5},
    "window of some layers": {"window": 4, "window_layers": (1,), "window_rope_base": 50.0, "attention_cap": 2.0},
    "expert": {"latent_weights": "refine", "expert": {"width": 16, "mlp_width": 24}},
    "expert of some layers": {"latent_weights": "refine", "depth": 3, "expert": {"width": 48, "layers": (0, 2)}},
    "partial rotary, bases": {"rotary": RotarySpec(partial=0.75, bases=(1e4, 1e2, 1e2))},
}


def model_of(**spec: Any) -> Omni:
    """A model without zero parts: biases and norms are random too."""
    model = small_model(**spec)
    with torch.no_grad():
        declared = declarations(model.transformer)
        for name, parameter in model.transformer.named_parameters():
            if declared[name].start in ("zero", "constant"):
                parameter += Key(3).fold(name).normal(tuple(parameter.shape)) * 0.2
    return model


def test_every_field_of_a_layer_has_a_variant() -> None:
    """A new field of LayerSpec needs a row of VARIANTS; fields with one implemented value have none yet."""
    sizes = {"width", "num_heads", "num_kv_heads", "head_dim", "mlp_width", "norm_eps", "rope_base", "modulation_eps"}
    varied = {name for spec in VARIANTS.values() for name in spec}
    unserved = {name for name, values in SERVED.items() if len(values) == 1}
    assert LayerSpec.model_fields.keys() - sizes - unserved <= varied


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_keep_the_contract(name: str) -> None:
    """Training, cached and uncached outputs are one function, and the variant differs from the default layer."""
    model = model_of(**VARIANTS[name])
    found = {check.name: check for check in verify(model)}
    assert all(check.holds for check in found.values()), found
    assert any(check.bar == EXACT for check in found.values())


def outputs(model: Omni) -> dict[str, Tensor]:
    """The results of the four uses of the definition, on one batch: float64."""
    model, batch = model.double(), random_batch(Key(4), num_documents=2, copies=2, rows=1)
    batch = replace(batch, latents=batch.latents.double(), refine_latents=batch.refine_latents.double())
    hidden, memory = model.context(batch)
    t = torch.linspace(0.2, 0.9, batch.num_items, dtype=torch.float64)
    call = BatchFlowCall(model, batch, memory, torch.ones_like(t))
    x, one = batch.refine_latents, torch.ones_like(t)
    rate = call.derivative(x, t, 0.5 * t, torch.ones_like(x), one, 0.5 * one)
    [history] = histories_of(model, [[]])
    decoded = torch.cat([read(model, [history], [[text([n])]])[0] for n in (3, 1, 4)])
    return {"context": hidden, "refine": call(x, t, 0.5 * t), "derivative": rate, "decoding": decoded}


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_tangents_of_variants_are_central_differences(name: str) -> None:
    sizes = {"head_dim": VARIANTS[name].get("head_dim", 8)}
    found, plain = outputs(model_of(**VARIANTS[name])), outputs(model_of(**sizes))
    central = outputs(model_of(**VARIANTS[name], tangents="central"))
    assert far(found["derivative"], central["derivative"]) < 1e-6
    assert max(far(found[use], plain[use]) for use in ("context", "refine", "decoding")) > 1e-3  # an effect


@torch.no_grad()
def test_one_constant_changes_all_four_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one constant of the definition changed, all uses equal those of the spec with that constant."""
    before, wanted = outputs(small_model()), outputs(small_model(residual_scale=0.5))
    source, changed = inspect.getsource(omni.nn.layer.run_layer), dict(vars(omni.nn.layer))
    assert source.count("c.residual_scale") == 2
    exec(source.replace("c.residual_scale", "0.5"), changed)
    monkeypatch.setattr(omni.nn.transformer, "run_layer", changed["run_layer"])
    after = outputs(small_model())
    for use, value in wanted.items():
        assert far(before[use], value) > 1e-3 and far(after[use], value) < 1e-12, use


def test_rotary_tables() -> None:
    """By the formulas of the papers: the axis and the frequency of each pair."""
    position = torch.tensor([[[5, 7, 11]]])
    angles = {
        RotarySpec(layout="sections", sections=(2, 1, 1)): [5, 5 / 10, 7 / 100, 11 / 1000],
        RotarySpec(layout="interleaved", sections=(2, 1, 1)): [5, 7 / 10, 11 / 100, 5 / 1000],
        RotarySpec(partial=0.5): [5, 7 / 100, 0, 0],
        RotarySpec(bases=(1e4, 1e2, 1e2)): [5, 7, 11, 5 / 100],
    }
    for spec, wanted in angles.items():
        cos, sin = rotary_table(position, 8, 1e4, torch.float64, spec)
        expected = torch.tensor([*wanted, *wanted], dtype=torch.float64)
        torch.testing.assert_close(cos[0, 0, 0], expected.cos())
        signs = torch.tensor([-1.0] * 4 + [1.0] * 4, dtype=torch.float64)
        torch.testing.assert_close(sin[0, 0, 0], signs * expected.sin())


def test_unimplemented_values_are_refused_by_name() -> None:
    layers = {"qk_norm": "axis", "activation": "relu2", "time": "input"}
    assert layers.keys() == SERVED.keys()
    for name, value in layers.items():
        with pytest.raises(ValueError, match=f"{name} = {value!r} is not implemented yet; implemented: "):
            LayerSpec(**{name: value})  # type: ignore[arg-type]
    streams = {"block_positions": "one", "block_markers": True, "clean_frames": True, "guidance_positions": "full"}
    assert streams.keys() == WEIGHTS_SERVED.keys()
    for name, value in streams.items():
        with pytest.raises(ValueError, match=f"{name} = {value!r} is not implemented yet"):
            TransformerConfig(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scaling = 'yarn'"):
        LayerSpec(rotary=RotarySpec(scaling="yarn"))  # type: ignore[arg-type]
    table = {"transformer": {**TransformerConfig().model_dump(), "time": "input"}, "flow": {}, "vocab_size": 9}
    message = "^here: transformer: time = 'input' is not implemented yet; implemented: 'modulation'$"
    with pytest.raises(ValueError, match=message):
        build(table, OmniConfig, "here")  # names the field, without all others
    with pytest.raises(ValueError, match=r"rotary.sections = \[1, 1, 1\] must add up to the 32 frequencies"):
        LayerSpec(rotary=RotarySpec(layout="sections", sections=(1, 1, 1)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"rotary": {"layout": "interleaved", "sections": (2, 20, 10)}},
            r"sections = \[2, 20, 10\] cannot be interleaved: of 32 frequencies, rows have at most 11 and columns 10; "
            r"this would be \[11, 11, 10\]",
        ),
        ({"rotary": {"layout": "interleaved", "sections": (10, 10, 12)}}, r"cannot be .* this would be \[12, 10, 10\]"),
        ({"rotary": {"bases": (1e4, 0.0, 1e2)}}, "rotary.bases.1 = 0.0: Input should be greater than 1"),
        ({"rotary": {"bases": (-5.0, 1e4, 1e2)}}, "rotary.bases.0 = -5.0: Input should be greater than 1"),
        ({"rotary": {"partial": 0.01}}, "partial = 0.01 of a head of width 64 rotates nothing; give at least 0.03"),
        ({"rotary": {"bases": (1e4, 1e2, 1e2)}, "rope_base": 5e5}, "rope_base = 500000 has no effect with rotary"),
    ],
)
def test_rotary_values_that_cannot_take_effect_are_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerSpec(**spec)


def test_interleaved_sections_are_used_as_given() -> None:
    """All that a head of 16 (8 frequencies) can have."""
    for rows in range(4):
        for columns in range(3):
            sections = (8 - rows - columns, rows, columns)
            axes = LayerSpec(head_dim=16, rotary=RotarySpec(layout="interleaved", sections=sections)).rotary.axes(8)
            assert torch.bincount(axes, minlength=3).tolist() == list(sections)


@pytest.mark.parametrize("name", sorted(NATIVE))
def test_the_native_step_refuses_other_layers_by_name(name: str) -> None:
    value = next(spec[name] for spec in VARIANTS.values() if name in spec and spec[name] not in NATIVE[name])
    model = small_model(**{name: value})
    with pytest.raises(ValueError, match=f"compile=True supports layers with {name} = "):
        CompiledStep(model.transformer, model.token.output_weight)


def test_the_native_step_serves_layers_without_qk_norm() -> None:
    model = small_model(qk_norm="none")
    found = [check for check in verify(model) if "compiled" in check.name]
    assert found and all(check.holds for check in found)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"expert": {"width": 8}}, "expert has no effect with latent_weights = 'shared'"),
        (
            {"expert": {"layers": (2, 1)}, "latent_weights": "refine"},
            r"expert.layers = \[2, 1\]: give layers of 0 to 7",
        ),
        ({"window_layers": (0,)}, "window_layers has no effect without window"),
        ({"window": 4, "window_layers": (9,)}, "window_layers names layer 9; give layers of 0 to 7"),
        ({"window": 4, "tangents": "streamed"}, "tangents = 'streamed' is not implemented for layers with window"),
    ],
)
def test_weights_and_windows_that_do_not_fit_are_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**spec)
