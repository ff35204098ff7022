"""A saved tiny model without zero weights, and engines whose token choices follow a script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import omni
from omni.generation.engine import Engine
from omni.generation.request import Phase, Request
from omni.heads.joint import JointConfig
from omni.model import Omni
from omni.rng import Key


def living(directory: Path) -> Omni:
    """The model, with random weights in place of zero starts."""
    return enliven(omni.from_pretrained(directory))


def enliven(model: Omni) -> Omni:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name or "velocity" in name:
                parameter.copy_(Key(0).fold(name).normal(tuple(parameter.shape)) * 0.2)
    return model


def with_head(directory: Path, head: str, length: int = 4, **settings: Any) -> Omni:
    """The saved model with a joint-token head, which drafts by default. settings: more of JointConfig."""
    plain = omni.from_pretrained(directory)
    joint = JointConfig(head=head, length=length, adapter_rank=2, **settings)
    model = Omni(plain.config.model_copy(update={"joint": joint}), Key(0)).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    model.tokenizer, model.codec = plain.tokenizer, plain.codec
    model.defaults = {**plain.defaults, "tokens_per_pass": length}
    return model


def force(model: Omni, script: list[int]) -> Engine:
    """An engine whose token choices follow a script per request, to test structure on random weights."""
    engine = Engine(model)
    follow(engine, lambda request: script)
    return engine


def follow(engine: Engine, script_of: Callable[[Request], list[int]]) -> None:
    """The mask of this engine's grammar leaves the scripted id alone; after its script a request chooses freely."""
    mask_of = engine.grammar.mask_of

    def scripted(request: Request, phase: Phase) -> Tensor:
        mask, script = mask_of(request, phase), script_of(request)
        if request.num_tokens >= len(script):
            return mask
        return torch.full_like(mask, -torch.inf).index_fill(0, torch.tensor(script[request.num_tokens]), 0)

    engine.grammar.mask_of = scripted  # type: ignore[method-assign]
