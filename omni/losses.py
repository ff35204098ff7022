"""Objectives on a packed batch: one context pass, and F(x, t, s) over its memory as objectives call it.

Legend: R rows, T context positions, S refine positions, W width, C latent channels, I items (copies).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from omni.heads.joint.backbone import Backbone
from omni.heads.joint.training import joint_loss
from omni.nn.cache import Memory
from omni.nn.tangent import Dual, Form, differentiate
from omni.objectives import FlowObjective, Objective, Terms
from omni.objectives.base import Items
from omni.objectives.joint_tokens import JointTokenObjective
from omni.objectives.next_token import NextToken
from omni.rng import Key
from omni.sequence.layout import IGNORE, Batch, Stream


class TrainedModel(Backbone, Protocol):
    """What the losses need of a model: `omni.model.Omni` is one."""

    def context(self, batch: Batch) -> tuple[Tensor, Memory]:
        """The context stream: hidden states (R, T, W), and what the refine stream reads of it."""
        ...

    def velocity(
        self, x: Tensor, t: Tensor, s: Tensor, guidance: Tensor, stream: Stream, item: Tensor | None, memory: Memory
    ) -> Tensor:
        """F(x, t, s): x (R, S, C), t, s, guidance (I,) -> (R, S, C)."""
        ...


@dataclass
class FlowCall:
    """F(x, t, s) of one batch: what an objective sees (see objectives.base.FlowCall). Closes over model and context.

    `frozen`: results have no graph. `averages`: the target network, whose own context pass is made when first asked.
    """

    model: TrainedModel
    batch: Batch
    memory: Memory
    guidance: Tensor  # (I,) beta = 1 / w
    averages: TrainedModel | None = None
    frozen: bool = False

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.model.velocity(x, t, s, self.guidance, self.batch.refine, self.batch.item, self.memory)

    def derivative(self, x: Tensor, t: Tensor, s: Tensor, dx: Tensor, dt: Tensor, ds: Tensor) -> Tensor:
        with torch.no_grad():
            return self._dual("two_pass", (x, t, s), (dx, dt, ds)).tangent

    def with_derivative(
        self, x: Tensor, t: Tensor, s: Tensor, dx: Tensor, dt: Tensor, ds: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._dual("carried", (x, t, s), (dx, dt, ds))

    def _dual(self, form: Form, point: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> Dual:
        """F and its derivative, as the model takes derivatives."""
        c = self.model.transformer.c
        if c.tangents != "central":
            return differentiate(self, point, direction, form)
        with torch.autocast(point[0].device.type, enabled=False):  # half-precision differences are rounding
            return differentiate(self, point, direction, "central", c.tangent_step)

    @cached_property
    def _target(self) -> FlowCall:
        if self.averages is None:
            return replace(self, memory=self.memory.detach(), frozen=True)
        with torch.no_grad():
            _, memory = self.averages.context(self.batch)
        return FlowCall(self.averages, self.batch, memory, self.guidance, frozen=True)

    def target(self, graph: bool = False) -> FlowCall:
        return replace(self._target, frozen=False) if graph else self._target

    @cached_property
    def _null(self) -> NullCall:
        null = self.batch.null
        if null is None:
            raise ValueError("this batch has no null contexts; load it with null_contexts=True (guidance needs them)")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            _, memory = self.model.context(null)
        return NullCall(replace(self, batch=null, memory=memory, guidance=torch.ones_like(self.guidance)), self.batch)

    def null(self) -> NullCall:
        return self._null

    def guided(self, beta: Tensor) -> FlowCall:
        call = replace(self, guidance=beta)
        if "_null" in self.__dict__:  # contexts do not depend on guidance: those that were made are kept
            call.__dict__["_null"] = self._null
        if "_target" in self.__dict__:
            call.__dict__["_target"] = self._target.guided(beta)
        return call


@dataclass
class NullCall:
    """F without its condition: `call` has the same items in the same order, each in a row behind an empty history."""

    call: FlowCall
    batch: Batch

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        there, here = self.call.batch.item >= 0, self.batch.item >= 0
        moved = x.new_zeros(*there.shape, x.shape[-1])
        moved[there] = x[here]
        found = self.call(moved, t, s)
        out = found.new_zeros(*here.shape, x.shape[-1])
        out[here] = found[there]
        return out


def batch_losses(
    model: TrainedModel,
    batch: Batch,
    objectives: Sequence[Objective],
    key: Key,
    averages: TrainedModel | None = None,
    progress: float = 1.0,
) -> dict[str, Terms]:
    """Named (sum, count) terms of each objective; absent modalities give count 0. See Omni.loss."""
    hidden, memory = model.context(batch)
    terms: dict[str, Terms] = {}
    for objective in objectives:
        name = type(objective).__name__
        if isinstance(objective, JointTokenObjective):
            found = joint_loss(model, batch, hidden, memory, objective.blocks, key.fold(name), progress)
            terms |= {f"{name}/{n}": replace(t, weight=t.weight * objective.weight) for n, t in found.items()}
        elif isinstance(objective, NextToken):
            where = batch.target != IGNORE
            terms[name] = objective.loss(model.token.read(hidden[where]), batch.target[where])
        elif isinstance(objective, FlowObjective) and batch.num_items:
            is_null = torch.tensor([uid in batch.dropped for uid, _, _ in batch.item_names], device=batch.ids.device)
            items = Items(batch.refine_latents, batch.item, batch.item_names, is_null, progress, objective.pairing)
            beta = torch.ones(batch.num_items, device=batch.ids.device)
            # Where it wants no average, one that is kept for another objective is not its own.
            own = averages if getattr(objective, "target_decay", None) else None
            call = FlowCall(model, batch, memory, beta, own)
            terms[name] = objective.loss(call, objective.draw(items, key.fold(name)))
        elif isinstance(objective, FlowObjective):
            terms[name] = Terms(hidden.new_zeros((), dtype=torch.float32), 0.0, objective.weight)
    return terms
