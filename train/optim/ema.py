"""Exponential moving averages of weights: own <- d own + (1 - d) live, after each update of the live weights.

`Ema` keeps float32 tensors by name, for checkpoints. `AveragedModel` is a second model, for sampling while training
and for target networks. The decay d warms up, so early weights fade soon; buffers are not averaged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def warmed_decay(decay: float, num_updates: int, start: int = 10) -> float:
    """min(decay, (1 + n) / (start + n)) after n updates."""
    return min(decay, (1 + num_updates) / (start + num_updates))


@torch.no_grad()
def update_averages(averages: Sequence[Tensor], live: Sequence[Tensor], decay: float) -> None:
    """averages <- decay averages + (1 - decay) live, in place; dtypes are equal."""
    torch._foreach_lerp_(list(averages), [tensor.detach() for tensor in live], 1.0 - decay)


class Ema:
    """Averages of a module's named parameters, float32. `applied()` lends them to the module for a while.

    start: of the decay's warm-up (see warmed_decay).
    """

    def __init__(self, module: nn.Module, decay: float, start: int = 10) -> None:
        self.decay, self.start, self.num_updates = decay, start, 0
        self._live = dict(module.named_parameters())
        self.averages = {name: p.detach().to(torch.float32, copy=True) for name, p in self._live.items()}

    def update(self, number: int | None = None) -> None:
        """number: of updates before this one, where the caller counts otherwise."""
        number = self.num_updates if number is None else number
        moving = {name: p for name, p in self._live.items() if p.requires_grad}  # others are equal to their averages
        live = [p.detach().float() for p in moving.values()]
        if moving:
            averages = [self.averages[name] for name in moving]
            update_averages(averages, live, warmed_decay(self.decay, number, self.start))
        self.num_updates = number + 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the context the module's parameters hold the averages; afterwards exactly what they held before."""
        kept = {name: p.detach().clone() for name, p in self._live.items()}
        try:
            self._copy(self.averages)
            yield
        finally:
            self._copy(kept)

    def load(self, averages: Mapping[str, Tensor], num_updates: int) -> None:
        """Raises ValueError when names or shapes differ from the module's."""
        for name, value in self.averages.items():
            if name not in averages or averages[name].shape != value.shape:
                raise ValueError(f"the saved average of {name!r} is missing or of another shape; use the same recipe")
            value.copy_(averages[name])
        self.num_updates = num_updates

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        """Write values into the parameters, in place."""
        for name, parameter in self._live.items():
            parameter.copy_(values[name])


def copy_of(model: Module) -> Module:
    """A copy, on the device of the model and in its dtype. Its attributes `tokenizer`, `codec` and `encoder` are
    shared; an encoder that is trained (`tower`) is copied with the model."""
    names = ("tokenizer", "codec") if getattr(model, "tower", None) is not None else ("tokenizer", "codec", "encoder")
    shared = {id(part): part for part in (getattr(model, name, None) for name in names) if part}
    return copy.deepcopy(model, shared)


class AveragedModel(Generic[Module]):
    """`model`: a copy of the given one, on its device and in its dtype, without gradients, whose weights follow.

    warms_up: whether the decay does; the copy starts as the model in any case. What the copy shares
    with the model: see copy_of.
    """

    def __init__(self, model: Module, decay: float, warms_up: bool = True) -> None:
        self.decay, self.warms_up, self.num_updates = decay, warms_up, 0
        self._live = list(model.parameters())
        self.model = copy_of(model).requires_grad_(False)

    def update(self) -> None:
        """Take one step of the average towards the present weights."""
        decay = warmed_decay(self.decay, self.num_updates) if self.warms_up else self.decay
        update_averages(list(self.model.parameters()), self._live, decay)
        self.num_updates += 1

    def restart(self) -> None:
        """Begin again, as a copy of the present weights."""
        torch._foreach_copy_(list(self.model.parameters()), [p.detach() for p in self._live])
        self.num_updates = 0
