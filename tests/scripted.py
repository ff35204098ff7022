"""A saved tiny model without zero weights, and engines whose token choices follow a script."""

from __future__ import annotations

from pathlib import Path

import torch

import omni
from omni.generation.engine import Engine
from omni.model import Omni
from omni.rng import Key


def living(directory: Path) -> Omni:
    """The model, with random weights in place of zero starts."""
    model = omni.from_pretrained(directory)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name or "velocity" in name:
                parameter.copy_(Key(0).fold(name).normal(tuple(parameter.shape)) * 0.2)
    return model


def force(model: Omni, script: list[int]) -> Engine:
    """An engine whose token choices follow a script per request, to test structure on random weights."""
    engine = Engine(model)
    choose = engine._choose

    def scripted(rows, logits):  # noqa: ANN001, ANN202
        chosen = choose(rows, logits)
        return [
            script[r.num_tokens - 1] if r.num_tokens <= len(script) else c for r, c in zip(rows, chosen, strict=True)
        ]

    engine._choose = scripted  # type: ignore[method-assign]
    return engine
