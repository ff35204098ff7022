"""Scaled rotary frequencies against transformers' modeling_rope_utils, computed in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eval.experiments.imports.rotary import CASES, difference
from omni.config import build
from omni.nn.layer import LayerSpec
from omni.sequence.positions import RotarySpec, rotary_table


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_magnitude(name: str) -> None:
    assert difference(name) < 1e-12


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
