"""Optimisers behind one face: Muon for the hidden matrices of the transformer, AdamW for everything else.

Muon (train/optim/muon.py; update RMS matched to AdamW's, arXiv 2502.16982) wants 2-D weights that map hidden to
hidden: attention and feed-forward matrices, which modules declare (omni.nn.declare). The rest stays with AdamW.
The learning rate is `rate * multiplier`, set before every step from the schedule, so no scheduler has state.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from omni.config import Frozen
from train.optim.muon import Muon


class OptimiserConfig(Frozen):
    """`rate` is AdamW's; `muon_rate` is on AdamW's scale too (match_rms_adamw). Weight decay is decoupled."""

    name: Literal["muon", "adamw"] = "muon"
    rate: float = Field(2e-3, gt=0)
    muon_rate: float = Field(1e-2, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = Field(0.95, ge=0, lt=1)
    warmup_steps: int = Field(100, ge=0)
    decay: Literal["linear", "cosine", "wsd", "none"] = "cosine"
    decay_fraction: float = Field(0.25, gt=0, le=1, description="wsd: share of the run spent falling")
    schedule_steps: int | None = Field(None, ge=1, description="steps of the decay; else it spans the run")
    min_factor: float = Field(0.0, ge=0, le=1, description="what the decay falls to, as a share of the rate")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")

    @model_validator(mode="after")
    def _take_effect(self) -> OptimiserConfig:
        if self.decay == "none" and (self.schedule_steps is not None or self.min_factor):
            raise ValueError("schedule_steps and min_factor have no effect with decay = 'none'; leave them out")
        return self


def multiplier(config: OptimiserConfig, step: int, fraction: float) -> float:
    """Factor on every learning rate at `step` (from 0), when `fraction` in [0, 1] of the run is behind us.

    With `schedule_steps` the decay is over that many steps, however long the run is: a longer run goes on at
    `min_factor`, and the rate of a step does not change when the run is made longer.
    """
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule_steps is not None:
        fraction = step / config.schedule_steps
    fraction = min(max(fraction, 0.0), 1.0)
    match config.decay:
        case "linear":
            fall = 1.0 - fraction
        case "cosine":
            fall = 0.5 * (1.0 + math.cos(math.pi * fraction))
        case "wsd":
            fall = min(1.0, (1.0 - fraction) / config.decay_fraction)
        case _:
            fall = 1.0
    return warm * (config.min_factor + (1.0 - config.min_factor) * fall)


class Optimiser:
    """One face over one or two torch optimisers. Parameters are known by name, and so is their state. hidden: names of
    those that Muon takes."""

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], config: OptimiserConfig, hidden: Collection[str] = ()
    ) -> None:
        self.config = config
        named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        self.names = {parameter: name for name, parameter in named}
        muon_names = set(hidden) if config.name == "muon" else set()
        matrices_of_muon = [p for name, p in named if name in muon_names]
        taken = set(matrices_of_muon)
        rest = [p for _, p in named if p not in taken]
        self._parts: list[tuple[str, float, torch.optim.Optimizer]] = []
        if taken:
            muon = Muon(matrices_of_muon, config.muon_rate, config.weight_decay, config.momentum)
            self._parts.append(("muon", config.muon_rate, muon))
        if rest:
            matrices = [p for p in rest if p.ndim >= 2]
            vectors = [p for p in rest if p.ndim < 2]
            groups = [{"params": matrices, "weight_decay": config.weight_decay}]
            groups.append({"params": vectors, "weight_decay": 0.0})
            adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.rate, betas=config.betas, eps=1e-8)
            self._parts.append(("adamw", config.rate, adamw))

    def members(self) -> dict[str, list[str]]:
        """Optimiser name -> sorted names of its parameters."""
        return {
            name: sorted(self.names[p] for group in part.param_groups for p in group["params"])
            for name, _, part in self._parts
        }

    def step(self, multiplier: float) -> None:
        for _, rate, part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate * multiplier
            part.step()

    def zero_grad(self) -> None:
        for _, _, part in self._parts:
            part.zero_grad(set_to_none=True)

    def clip(self) -> float:
        """Scale all gradients to norm at most `clip`; returns the norm before. A non-finite norm changes nothing."""
        with_grad = [p for p in self.names if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in with_grad if p.grad is not None])
        if bool(torch.isfinite(norm)):
            torch.nn.utils.clip_grads_with_norm_(with_grad, self.config.clip, norm)
        return float(norm)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """All optimiser state as flat tensors named `<optimiser>/<parameter>/<slot>`."""
        flat: dict[str, torch.Tensor] = {}
        for part_name, _, part in self._parts:
            for parameter, slots in part.state.items():
                for slot, value in slots.items():
                    assert isinstance(value, torch.Tensor), f"optimiser slot {slot} is not a tensor"
                    flat[f"{part_name}/{self.names[parameter]}/{slot}"] = value
        return flat

    def load_state_tensors(self, flat: Mapping[str, torch.Tensor]) -> None:
        """Inverse of state_tensors. Raises ValueError when a tensor belongs to no parameter here."""
        known = {(part_name, self.names[p]): (part, p) for part_name, _, part in self._parts for p in _parameters(part)}
        for _, _, part in self._parts:
            part.state.clear()
        for full_name, value in flat.items():
            part_name, name, slot = full_name.split("/")
            if (part_name, name) not in known:
                raise ValueError(f"optimiser state {full_name!r} fits no parameter of this model; use the same recipe")
            part, parameter = known[part_name, name]
            value = value.clone() if value.ndim == 0 else value.to(parameter.device).clone()
            part.state[parameter][slot] = value


def _parameters(part: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in part.param_groups for p in group["params"]]
