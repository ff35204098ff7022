"""Modules declare the initialisation and the optimiser group of their own weights.

A module that owns parameters, directly or in its linear layers, has a method

    def declare(self) -> dict[str, Declared]

with one entry per parameter, by its name below the module. `declarations` collects them by full name. The full name
keys the random initial values: adding or sharding a module changes no other weight. A renamed parameter keeps its old
name in `drawn_as`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import nn

from omni.config import nearest
from omni.rng import Key

Group = Literal["hidden", "other"]
Start = Literal["fan_in", "embedding", "constant"]


@dataclass(frozen=True)
class Declared:
    """start: "fan_in" is normal with deviation 1 / (divisor sqrt(fan in)); "embedding" is normal with deviation
    `value`; "constant" is `value`. group: "hidden" for matrices from hidden states to hidden states, which Muon
    updates. drawn_as: the full name in the key, if not the parameter's own. ValueError for an unknown start or group.
    Another start changes the initial weights of every recipe.
    """

    start: Start
    value: float = 1.0
    divisor: float = 1.0
    group: Group = "other"
    drawn_as: str | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("start", self.start, get_args(Start)), ("group", self.group, get_args(Group))):
            if value not in known:
                raise ValueError(f"Declared.{name} = {value!r}{nearest(value, known) or f'; known: {known}'}")


FAN_IN, ZERO, ONE = Declared("fan_in"), Declared("constant", 0.0), Declared("constant", 1.0)
HIDDEN = replace(FAN_IN, group="hidden")
EMBEDDING = Declared("embedding", 0.02)


def of_linear(name: str, module: nn.Linear, declared: Declared = FAN_IN) -> dict[str, Declared]:
    """The weight of a linear layer as declared; a bias starts at zero."""
    return {f"{name}.weight": declared} | ({} if module.bias is None else {f"{name}.bias": ZERO})


def declarations(model: nn.Module) -> dict[str, Declared]:
    """The declarations of all modules, by full name. ValueError for a name that is no parameter or is declared
    twice."""
    parameters, found = {name for name, _ in model.named_parameters()}, dict[str, Declared]()
    for prefix, module in model.named_modules():
        declare = getattr(module, "declare", None)
        for name, declared in ({} if declare is None else declare()).items():
            full = f"{prefix}.{name}" if prefix else name
            if full not in parameters or full in found:
                raise ValueError(f"{type(module).__name__} declares {full!r}, which is no parameter, or declared twice")
            found[full] = declared
    return found


def hidden_names(model: nn.Module) -> set[str]:
    """Full names of the parameters of group "hidden"."""
    return {name for name, declared in declarations(model).items() if declared.group == "hidden"}


@torch.no_grad()
def initialise(model: nn.Module, key: Key) -> None:
    """Initialise every parameter as declared, except those of submodules with their own `initialise`. ValueError names
    an undeclared parameter."""
    declared = declarations(model)
    apart = tuple(f"{name}." for name, module in model.named_modules() if name and hasattr(module, "initialise"))
    for name, parameter in model.named_parameters():
        if name.startswith(apart):
            continue
        if name not in declared:
            raise ValueError(f"no module declares the initialisation of {name!r}; see omni.nn.declare")
        fill(parameter, declared[name], key.fold("initialise", declared[name].drawn_as or name), name)


@torch.no_grad()
def fill(parameter: nn.Parameter, declared: Declared, key: Key, name: str) -> None:
    """Initialise one parameter; random values come from `key`. The fan-in of a weight (out, ...) is the number of
    inputs of one output. ValueError, with the parameter's name, where it has none."""
    if declared.start == "constant":
        parameter.fill_(declared.value)
        return
    std = declared.value
    if declared.start == "fan_in":
        if parameter.ndim < 2:
            raise ValueError(
                f"{name!r} of shape {tuple(parameter.shape)} has no fan-in; declare it as a constant or an embedding"
            )
        std = 1 / math.sqrt(math.prod(parameter.shape[1:])) / declared.divisor
    parameter.copy_(key.normal(tuple(parameter.shape)) * std)
