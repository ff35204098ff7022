"""The teacher and the critic of an objective on rollouts (objectives.base.RolloutObjective).

The critic begins as a copy of the model and has an optimiser of its own. It is updated after each update of the model,
so it follows the distribution of the model's present samples. Both networks are saved: a resume does not depend on the
directory of the teacher.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from omni.losses import ScoreNetworks
from omni.objectives import Objective
from omni.objectives.base import RolloutObjective
from train.guard import Guard
from train.optim.ema import copy_of
from train.optim.optimiser import OptimiserConfig, build_optimiser


class Critic:
    """`networks`: teacher and critic. steps: updates of the critic after each of the model.

    model: whose copy the critic is; gradients are given to the same weights. teacher: frozen here, and put into
    evaluation mode. config, hidden: of the optimiser, see build_optimiser. rate: times its learning rates. limit:
    updates in a row that are not finite, which stop the run.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module, config: OptimiserConfig, hidden: Collection[str] = (),
        steps: int = 1, rate: float = 1.0, limit: int = 10,
    ) -> None:  # fmt: skip
        self.model, self.teacher = copy_of(model), teacher.requires_grad_(False).eval()
        slower = {"rate": rate * config.rate, "muon_rate": rate * config.muon_rate}
        self.optimiser = build_optimiser(self.model.named_parameters(), config.model_copy(update=slower), hidden)
        self.steps, self.guard = steps, Guard(limit)

    @property
    def networks(self) -> ScoreNetworks:
        return ScoreNetworks(self.teacher, self.model)  # type: ignore[arg-type]

    def update(self, loss: torch.Tensor, rate: float, step: int, documents: Sequence[int]) -> None:
        """One update by the gradient of `loss`, at `rate` times the learning rates; none where it is not finite, or
        has no graph: documents without pictures."""
        if not loss.requires_grad:
            return
        loss.backward()
        norm = float(self.optimiser.clip())
        if self.guard.accepts(step, float(loss.detach()), norm, documents):
            self.optimiser.step(rate)
        self.optimiser.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights of both networks and the critic's optimiser state, as checkpoints store them."""
        return {
            **{f"optimiser/{name}": value for name, value in self.optimiser.state_tensors().items()},
            **{name: parameter.detach() for name, parameter in self._parameters().items()},
        }

    @torch.no_grad()
    def load(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Inverse of `tensors`. Raises ValueError where names or shapes differ."""
        for name, parameter in self._parameters().items():
            if name not in saved or saved[name].shape != parameter.shape:
                raise ValueError(f"the saved critic lacks {name!r} or has it in another shape; use one recipe")
            parameter.copy_(saved[name])
        begin = "optimiser/"
        state = {name.removeprefix(begin): value for name, value in saved.items() if name.startswith(begin)}
        self.optimiser.load_state_tensors(state)

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The weights of both networks by their names in checkpoints."""
        both = {"critic": self.model, "teacher": self.teacher}
        return {f"{part}/{name}": p for part, network in both.items() for name, p in network.named_parameters()}


def rollout_objective(objectives: Sequence[Objective]) -> RolloutObjective | None:
    """The objective that needs a critic; None if none does. ValueError for two, and for one of another kind."""
    found = [each for each in objectives if each.needs_critic]
    names = ", ".join(type(each).__name__ for each in found)
    if len(found) > 1:
        raise ValueError(f"{names} need a critic each, and a run has one; train them apart")
    if found and not isinstance(found[0], RolloutObjective):
        raise ValueError(f"{names} needs a critic, so it must be a RolloutObjective (omni.objectives.base)")
    return found[0] if found else None  # type: ignore[return-value]
