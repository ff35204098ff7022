"""Optimisers behind one face: any torch optimisers whose rates share a schedule.

`build_optimiser` makes the one of a model: Muon for its hidden matrices, AdamW for everything else. Muon
(train/optim/muon.py; update RMS matched to AdamW's, arXiv 2502.16982) is for matrices from hidden states to hidden
states, of attention and MLPs, which modules declare (omni.nn.declare). A learning rate is a part's own rate times a
factor that is given with every step (train/optim/schedule.py), so no scheduler has state.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from omni.config import Frozen
from train.optim.muon import Muon
from train.optim.schedule import Decay, fall, rise


class OptimiserConfig(Frozen):
    """`rate` is AdamW's; `muon_rate` is on AdamW's scale too (match_rms_adamw); `encoder_rate` times `rate` is that of
    a trained encoder (tune_encoder). Weight decay is decoupled."""

    name: Literal["muon", "adamw"] = "muon"
    rate: float = Field(2e-3, gt=0)
    muon_rate: float = Field(1e-2, gt=0)
    encoder_rate: float = Field(0.1, gt=0, le=10, description="factor on `rate` for a trained encoder")
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = Field(0.95, ge=0, lt=1)
    warmup_steps: int = Field(100, ge=0)
    decay: Decay = "cosine"
    decay_fraction: float = Field(0.25, gt=0, le=1, description="wsd: share of the run spent falling")
    schedule_steps: int | None = Field(None, ge=1, description="steps of the decay; else it spans the run")
    min_factor: float = Field(0.0, ge=0, le=1, description="what the decay falls to, as a share of the rate")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")

    @model_validator(mode="after")
    def _take_effect(self) -> OptimiserConfig:
        if self.decay == "none" and (self.schedule_steps is not None or self.min_factor):
            raise ValueError("schedule_steps and min_factor have no effect with decay = 'none'; leave them out")
        idle = {} if self.decay == "wsd" else {"decay_fraction": f"decay = {self.decay!r}"}
        idle |= dict.fromkeys(("muon_rate", "momentum"), "name = 'adamw'") if self.name == "adamw" else {}
        for name, setting in idle.items():
            value, usual = getattr(self, name), type(self).model_fields[name].default
            if value != usual:
                raise ValueError(f"{name} = {value} has no effect with {setting}; leave it out (usual: {usual})")
        return self


def multiplier(config: OptimiserConfig, step: int, fraction: float) -> float:
    """Factor on every learning rate at `step` (from 0), when `fraction` in [0, 1] of the run is behind us.

    With `schedule_steps` the decay is over that many steps, however long the run is: a longer run goes on at
    `min_factor`, and the rate of a step does not change when the run is made longer.
    """
    if config.schedule_steps is not None:
        fraction = step / config.schedule_steps
    return rise(step, config.warmup_steps) * fall(fraction, config.decay, config.min_factor, config.decay_fraction)


class Optimiser:
    """One face over torch optimisers. Their state is known by the names of the parameters.

    parts: by name; the rates that they come with are multiplied by the factor of each step. parameters: whose gradients
    are clipped and cleared, in the order of the norm's sum; by default those of the parts. names: of the parameters of
    the parts, in the state; by default a parameter's number within its part. clip: largest gradient norm.
    """

    def __init__(
        self,
        parts: Mapping[str, torch.optim.Optimizer],
        parameters: Sequence[Tensor] | None = None,
        names: Mapping[Tensor, str] | None = None,
        clip: float = 1.0,
    ) -> None:
        self.parts, self.max_norm = dict(parts), clip
        self.names = names or {p: str(n) for part in parts.values() for n, p in enumerate(_parameters(part))}
        self.parameters = list(self.names if parameters is None else parameters)
        for part in self.parts.values():
            for group in part.param_groups:
                group["initial_lr"] = group["lr"]

    def members(self) -> dict[str, list[str]]:
        """Name of a part -> sorted names of its parameters."""
        return {name: sorted(self.names[p] for p in _parameters(part)) for name, part in self.parts.items()}

    def step(self, factor: float, left_out: Tensor | None = None) -> None:
        """One update, at `factor` times the rate of each part.

        left_out: 1.0 on the device where the step must change nothing, else 0.0 (see train.guard). Only the fused
        optimisers of torch have this.
        """
        for part in self.parts.values():
            if left_out is not None:
                assert part.defaults.get("fused"), "an optimiser that is not fused would take the step"
                part.found_inf = left_out  # type: ignore[attr-defined]  # as GradScaler does
            for group in part.param_groups:
                group["lr"] = group["initial_lr"] * factor
            part.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for part in self.parts.values():
            part.zero_grad(set_to_none=True)
        for parameter in self.parameters:
            parameter.grad = None

    def clip(self) -> Tensor:
        """Scale all gradients to norm at most `clip`; returns the norm before, on the device, and does not wait for it.
        Where the norm is not finite the gradients are of no use, and the step has to be left out."""
        return nn.utils.clip_grad_norm_(self.parameters, self.max_norm)

    def forget(self) -> None:
        """Drop all state, as before the first step."""
        for part in self.parts.values():
            part.state.clear()

    def state_tensors(self) -> dict[str, Tensor]:
        """All optimiser state as flat tensors named `<part>/<parameter>/<slot>`. Checkpoints store these names: never
        change them."""
        flat: dict[str, Tensor] = {}
        for part_name, part in self.parts.items():
            for parameter, slots in part.state.items():
                for slot, value in slots.items():
                    assert isinstance(value, Tensor), f"optimiser slot {slot} is not a tensor"
                    flat[f"{part_name}/{self.names[parameter]}/{slot}"] = value
        return flat

    def load_state_tensors(self, flat: Mapping[str, Tensor]) -> None:
        """Inverse of state_tensors. Raises ValueError when a tensor belongs to no parameter here."""
        known = {(name, self.names[p]): (part, p) for name, part in self.parts.items() for p in _parameters(part)}
        self.forget()
        for full_name, value in flat.items():
            part_name, name, slot = full_name.split("/")
            if (part_name, name) not in known:
                raise ValueError(f"optimiser state {full_name!r} fits no parameter of this model; use the same recipe")
            part, parameter = known[part_name, name]
            value = value.clone() if value.ndim == 0 else value.to(parameter.device).clone()
            part.state[parameter][slot] = value


def _parameters(part: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters of a torch optimiser, group by group."""
    return [p for group in part.param_groups for p in group["params"]]


def build_optimiser(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimiserConfig, hidden: Collection[str] = (), encoder: str = ""
) -> Optimiser:
    """Muon for the parameters whose names are in `hidden`, AdamW for the others that require gradients. encoder: what
    the names of those with `encoder_rate` begin with; none with ""."""
    trained = {name: parameter for name, parameter in named if parameter.requires_grad}
    of_muon = [p for name, p in trained.items() if config.name == "muon" and name in hidden]
    taken = set(of_muon)
    rest = [p for p in trained.values() if p not in taken]
    parts: dict[str, torch.optim.Optimizer] = {}
    if of_muon:
        parts["muon"] = Muon(of_muon, config.muon_rate, config.weight_decay, config.momentum)
    if rest:
        slow = [p for name, p in trained.items() if encoder and name.startswith(encoder)]
        usual = [p for p in rest if p not in set(slow)]
        groups = [
            {"params": members, "weight_decay": decay, "lr": config.rate * factor}
            for factor, part in ((1.0, usual), (config.encoder_rate, slow))
            for decay, members in (
                (config.weight_decay, [p for p in part if p.ndim >= 2]),
                (0.0, [p for p in part if p.ndim < 2]),
            )
            if members
        ]
        parts["adamw"] = torch.optim.AdamW(groups, lr=config.rate, betas=config.betas, eps=1e-8)
    names = {parameter: name for name, parameter in trained.items()}
    return Optimiser(parts, names=names, clip=config.clip)
