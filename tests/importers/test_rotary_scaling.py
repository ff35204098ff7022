"""Scaled rotary frequencies against transformers' modeling_rope_utils, computed in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from published_oracle import Wide

from omni.config import build
from omni.nn.layer import LayerSpec
from omni.sequence.positions import RotarySpec, rotary_table

LONG = {"short_factor": [1.0 + k / 8 for k in range(12)], "long_factor": [2.0 + k * k / 4 for k in range(12)]}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int | None]] = {  # transformers' keys, ours, length of the pass
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"kind": "linear", "factor": 4.0}, None),
    "dynamic": (
        {"rope_type": "dynamic", "factor": 3.0},
        {"kind": "dynamic", "factor": 3.0, "original_length": 64, "length": 200},
        200,
    ),
    "dynamic, short": (
        {"rope_type": "dynamic", "factor": 3.0},
        {"kind": "dynamic", "factor": 3.0, "original_length": 64, "length": 10},
        10,
    ),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 512},
        {"kind": "llama3", "factor": 8.0, "low_frequency_factor": 1.0, "high_frequency_factor": 4.0,
         "original_length": 512},
        None,
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        {"kind": "yarn", "factor": 4.0, "original_length": 256},
        None,
    ),
    "yarn, mscale": (
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 256, "mscale": 0.7,
         "mscale_all_dim": 1.3, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
        {"kind": "yarn", "factor": 40.0, "original_length": 256, "mscale": 0.7, "mscale_all_dim": 1.3,
         "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
        None,
    ),
    "yarn, attention factor": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "attention_factor": 0.8},
        {"kind": "yarn", "factor": 4.0, "original_length": 256, "attention_factor": 0.8},
        None,
    ),
    "longrope, short": (
        {"rope_type": "longrope", "original_max_position_embeddings": 32, "attention_factor": 1.2, **LONG},
        {"kind": "longrope", "original_length": 32, "attention_factor": 1.2, "length": 32},
        32,
    ),
    "longrope, long": (
        {"rope_type": "longrope", "original_max_position_embeddings": 32, "attention_factor": 1.2, **LONG},
        {"kind": "longrope", "original_length": 32, "attention_factor": 1.2, "length": 33},
        33,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_magnitude(name: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs, ours, length = CASES[name]
    if ours["kind"] == "longrope":
        ours = ours | {key.replace("factor", "factors"): tuple(value) for key, value in LONG.items()}
    parameters = {"rope_theta": 5000.0, **theirs}
    config = LlamaConfig(
        hidden_size=96, num_attention_heads=4, max_position_embeddings=64, rope_parameters=dict(parameters)
    )
    with Wide():
        wanted, magnitude = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, "cpu", seq_len=length)
    spec = RotarySpec.model_validate({"scaling": ours})
    LayerSpec(head_dim=24, rotary=spec)
    torch.testing.assert_close(spec.frequencies(24, 5000.0, torch.float64, "cpu"), wanted, rtol=1e-13, atol=0)
    assert spec.scaling is not None and spec.scaling.magnitude() == pytest.approx(magnitude, rel=1e-14)
    position = torch.tensor([[[7, 7, 7]]])
    cos, sin = rotary_table(position, 24, 5000.0, torch.float64, spec)
    torch.testing.assert_close(cos[0, 0, 0, :12], (7 * wanted).cos() * magnitude, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sin[0, 0, 0, 12:], (7 * wanted).sin() * magnitude, rtol=1e-12, atol=1e-12)


def test_dimensions_that_do_not_rotate_keep_their_size() -> None:
    scaling = {"kind": "yarn", "factor": 4.0, "original_length": 64, "attention_factor": 1.5}
    spec = RotarySpec.model_validate({"partial": 0.5, "scaling": scaling})
    cos, sin = rotary_table(torch.zeros(1, 1, 3, dtype=torch.int64), 8, 1e4, torch.float64, spec)
    assert cos[0, 0, 0].tolist() == [1.5, 1.5, 1, 1, 1.5, 1.5, 1, 1]
    assert not sin.any()


def test_older_files_name_no_scaling() -> None:
    assert RotarySpec.model_validate({"scaling": "none"}) == RotarySpec()
    assert RotarySpec().model_dump()["scaling"] is None


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"kind": "ntk", "factor": 2.0}, "ntk"),
        ({"kind": "linear"}, "scaling.linear.factor' is missing"),
        ({"kind": "linear", "factor": 0.5}, "scaling.linear.factor = 0.5"),
        ({"kind": "linear", "factor": 2.0, "length": 9}, "unknown key 'rotary.scaling.linear.length'"),
        (
            {"kind": "llama3", "factor": 2.0, "low_frequency_factor": 4.0, "high_frequency_factor": 4.0,
             "original_length": 8},
            "high_frequency_factor = 4 must be greater than low_frequency_factor = 4",
        ),
        (
            {"kind": "longrope", "short_factors": (1.0,), "long_factors": (1.0,), "original_length": 8, "length": 8},
            "rotary.scaling.short_factors has 1 values; the head has 8 frequencies",
        ),
    ],
)  # fmt: skip
def test_scalings_that_do_not_fit_raise(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build({"head_dim": 16, "rotary": {"scaling": scaling}}, LayerSpec, "here")
