"""Scaled rotary frequencies against transformers' modeling_rope_utils, computed in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eval.experiments.imports.decoders import largest
from eval.experiments.imports.oracle import Wide
from omni.nn.layer import LayerSpec
from omni.sequence.positions import RotarySpec, rotary_table

HEAD_DIM, BASE, POSITION = 24, 5000.0, 7
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


def difference(name: str) -> float:
    """The largest difference of the frequencies, of the magnitude and of a position's cosines and sines, relative to
    the published value (of cosines and sines to the magnitude)."""
    wanted, magnitude = _published(name)
    spec = RotarySpec.model_validate({"scaling": _ours(name)})
    LayerSpec(head_dim=HEAD_DIM, rotary=spec)
    found = spec.frequencies(HEAD_DIM, BASE, torch.float64, "cpu")
    assert spec.scaling is not None and len(found) == len(wanted)
    position = torch.full((1, 1, 3), POSITION)
    cos, sin = (table[0, 0, 0] for table in rotary_table(position, HEAD_DIM, BASE, torch.float64, spec))
    half, angles = HEAD_DIM // 2, POSITION * wanted  # the table's first sines are negative
    off = torch.cat([cos[:half] / magnitude - angles.cos(), sin[half:] / magnitude - angles.sin()])
    return largest(
        (
            float((found / wanted - 1).abs().max()),
            abs(spec.scaling.magnitude() / magnitude - 1),
            float(off.abs().max()),
        )
    )


def _ours(name: str) -> dict[str, Any]:
    """Our fields of a case."""
    ours = CASES[name][1]
    if ours["kind"] != "longrope":
        return ours
    return ours | {key.replace("factor", "factors"): tuple(value) for key, value in LONG.items()}


def _published(name: str) -> tuple[Tensor, float]:
    """Frequencies (D / 2,), float64, and the magnitude, of transformers."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs, _, length = CASES[name]
    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": BASE, **theirs},
    )
    with Wide():
        return ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, "cpu", seq_len=length)
