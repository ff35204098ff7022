"""The target network of objectives that have one: a second model that follows the first, for `FlowCall.target()`.

After each optimiser step its weights become decay * own + (1 - decay) * the model's (Terminal Velocity Matching, arXiv
2511.19797, section 4: 0.99). Unlike the averages that are published, it has no warm-up and takes part in the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from train.optim.ema import AveragedModel, Module


class Target(AveragedModel[Module]):
    """An averaged model without a warm-up that can be saved."""

    def __init__(self, model: Module, decay: float) -> None:
        super().__init__(model, decay, warms_up=False)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    @torch.no_grad()
    def load(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Inverse of `tensors`. Raises ValueError when names or shapes differ."""
        for name, value in self.tensors().items():
            if name not in saved or saved[name].shape != value.shape:
                raise ValueError(f"the saved target network lacks {name!r} or has it in another shape; use one recipe")
            value.copy_(saved[name])


def build_target(model: Module, objectives: Sequence[Any]) -> Target[Module] | None:
    """The target network that the objectives want. None when they want none, or one of decay 0: the present weights.

    Raises ValueError when they want different ones.
    """
    decays = {type(o).__name__: o.target_decay for o in objectives if getattr(o, "target_decay", None)}
    if len(set(decays.values())) > 1:
        raise ValueError(
            f"objectives want target networks of different target_decay: {decays}; give them one, or train them apart"
        )
    return Target(model, next(iter(decays.values()))) if decays else None
