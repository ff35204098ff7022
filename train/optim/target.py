"""The target network of objectives that have one: a second model that follows the first, for `FlowCall.target()`.

After each optimiser step its weights become decay * own + (1 - decay) * the model's (Terminal Velocity Matching, arXiv
2511.19797, section 4: 0.99). Unlike the averages that are published, it has no warm-up and takes part in the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from omni.objectives import Objective
from omni.objectives.base import target_decay_of
from train.optim.ema import AveragedModel, Module


class Target(AveragedModel[Module]):
    """An averaged model without a warm-up that can be saved."""

    def __init__(self, model: Module, decay: float) -> None:
        super().__init__(model, decay, warms_up=False)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by name, as checkpoints store them."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    @torch.no_grad()
    def load(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Inverse of `tensors`. Raises ValueError when names or shapes differ."""
        for name, value in self.tensors().items():
            if name not in saved or saved[name].shape != value.shape:
                raise ValueError(f"the saved target network lacks {name!r} or has it in another shape; use one recipe")
            value.copy_(saved[name])


def build_target(model: Module, objectives: Sequence[Objective]) -> Target[Module] | None:
    """The target network that the objectives want. None when they want none, or one of decay 0: the present weights.

    Raises ValueError when they want different ones.
    """
    pairs = [(type(objective).__name__, target_decay_of(objective)) for objective in objectives]
    decays = {decay for _, decay in pairs if decay}
    if len(decays) > 1:
        listed = ", ".join(f"{name} {decay}" for name, decay in pairs if decay)
        raise ValueError(
            f"objectives want target networks of different target_decay: {listed}; give them one, or train them apart"
        )
    return Target(model, decays.pop()) if decays else None
