"""The losses of objectives on a packed batch: one context pass, and F(x, t, s) over its memory.

Legend: R batch rows, T context positions, S refine positions, W width, C latent channels, I items (copies).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from omni.heads.joint.backbone import Backbone
from omni.heads.joint.training import joint_loss
from omni.nn.cache import Memory
from omni.nn.tangent import Dual, Form, differentiate
from omni.objectives import Objective, Terms
from omni.objectives.base import Items, check_blocks, target_decay_of
from omni.objectives.pairing import Pairing
from omni.rng import Key
from omni.sequence.block_context import BlockContext, joined, of_latents
from omni.sequence.layout import IGNORE, Batch, Stream
from omni.sequence.own_past import own_past


class TrainedModel(Backbone, Protocol):
    """The model interface of the losses: `omni.model.Omni` implements it."""

    @property
    def block_context(self) -> BlockContext: ...

    def context(self, batch: Batch) -> tuple[Tensor, Memory]:
        """The context stream: hidden states (R, T, W), and the memory that the refine stream attends to."""
        ...

    def velocity(
        self, x: Tensor, t: Tensor, s: Tensor, guidance: Tensor, stream: Stream, item: Tensor | None, memory: Memory
    ) -> Tensor:
        """F(x, t, s): x (R, S, C), t, s, guidance (I,) -> (R, S, C)."""
        ...


class Contexts:
    """The contexts of one network on one batch, computed on first use. They do not depend on guidance: calls that
    differ only in guidance share them. frozen: results have no graph."""

    def __init__(
        self, model: TrainedModel, batch: Batch, memory: Memory, averages: TrainedModel | None, frozen: bool
    ) -> None:
        self.model, self.batch, self.memory = model, batch, memory
        self.averages, self.frozen = averages, frozen

    @cached_property
    def null(self) -> Memory:
        """The memory of the same items after an empty history. ValueError if the batch has none."""
        if self.batch.null is None:
            raise ValueError("this batch has no null contexts, which guidance needs; load it with null_contexts=True")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.model.context(self.batch.null)[1]

    @cached_property
    def target(self) -> Contexts:
        """The contexts of the target network: averaged weights, or the present ones without a graph."""
        if self.averages is None:
            return Contexts(self.model, self.batch, self.memory.detach(), None, frozen=True)
        with torch.no_grad():
            _, memory = self.averages.context(self.batch)
        return Contexts(self.averages, self.batch, memory, None, frozen=True)


@dataclass
class BatchFlowCall:
    """F(x, t, s) of one batch: implements objectives.base.FlowCall. Closes over model and context.

    `frozen`: results have no graph. `averages`: the target network; its own context pass runs on first use.
    """

    model: TrainedModel
    batch: Batch
    memory: Memory
    guidance: Tensor  # (I,) beta = 1 / w
    averages: TrainedModel | None = None
    frozen: bool = False
    contexts: Contexts | None = None  # None: this call's own

    def __post_init__(self) -> None:
        self.contexts = self.contexts or Contexts(self.model, self.batch, self.memory, self.averages, self.frozen)

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.model.velocity(x, t, s, self.guidance, self.batch.refine, self.batch.item, self.memory)

    def derivative(self, x: Tensor, t: Tensor, s: Tensor, dx: Tensor, dt: Tensor, ds: Tensor) -> Tensor:
        with torch.no_grad():
            return self._with_tangent("two_pass", (x, t, s), (dx, dt, ds)).tangent

    def with_derivative(
        self, x: Tensor, t: Tensor, s: Tensor, dx: Tensor, dt: Tensor, ds: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._with_tangent("carried", (x, t, s), (dx, dt, ds))

    def _with_tangent(self, form: Form, point: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> Dual:
        """F and its derivative along `direction`, by the model's method of derivatives."""
        c = self.model.transformer.c
        if c.tangents != "central":
            return differentiate(self, point, direction, form)
        with torch.autocast(point[0].device.type, enabled=False):  # differences in half precision are rounding errors
            return differentiate(self, point, direction, "central", c.tangent_step)

    def target(self, graph: bool = False) -> BatchFlowCall:
        assert self.contexts is not None
        one = self.contexts.target
        return BatchFlowCall(one.model, self.batch, one.memory, self.guidance, None, not graph, one)

    def null(self) -> NullCall:
        assert self.contexts is not None
        memory, batch = self.contexts.null, self.batch.null
        assert batch is not None
        ones = torch.ones_like(self.guidance)
        return NullCall(replace(self, batch=batch, memory=memory, guidance=ones, contexts=None), self.batch)

    def guided(self, beta: Tensor) -> BatchFlowCall:
        return replace(self, guidance=beta)


@dataclass
class NullCall:
    """F without its condition: `call` has the same items in the same order, each in a batch row after an empty
    history."""

    call: BatchFlowCall
    batch: Batch

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        there, here = self.call.batch.item >= 0, self.batch.item >= 0
        moved = x.new_zeros(*there.shape, x.shape[-1])
        moved[there] = x[here]
        found = self.call(moved, t, s)
        out = found.new_zeros(*here.shape, x.shape[-1])
        out[here] = found[there]
        return out


@dataclass(frozen=True)
class ScoreNetworks:
    """The networks that an objective on rollouts compares: see objectives.base.RolloutObjective."""

    teacher: TrainedModel
    critic: TrainedModel


@dataclass(frozen=True)
class ContextPass:
    """One context pass over a batch, hidden states (R, T, W) and memory; and the other inputs of losses."""

    model: TrainedModel
    batch: Batch
    hidden: Tensor
    memory: Memory
    averages: TrainedModel | None
    progress: float
    scores: ScoreNetworks | None = None

    def items(self, batch: Batch, pairing: Pairing = "independent") -> Items:
        """The noisy copies of `batch`, this one or one made of it."""
        is_null = torch.tensor([uid in batch.dropped for uid, _, _ in batch.item_names], device=batch.ids.device)
        return Items(batch.refine_latents, batch.item, batch.item_names, is_null, self.progress, pairing)

    def no_terms(self, objective: Objective) -> dict[str, Terms]:
        """Of a batch without items."""
        return {"": Terms(self.hidden.new_zeros((), dtype=torch.float32), 0.0, objective.weight)}


def logits_terms(objective: Any, one: ContextPass, key: Key) -> dict[str, Terms]:
    """The terms of an objective on logits of supervised positions."""
    where = one.batch.target != IGNORE
    return {"": objective.loss(one.model.token.read(one.hidden[where]), one.batch.target[where])}


def flow_terms(objective: Any, one: ContextPass, key: Key) -> dict[str, Terms]:
    """The terms of an objective on latents; count 0 without items."""
    batch, context = one.batch, one.model.block_context
    if not batch.num_items:
        return one.no_terms(objective)
    if one.model.flow is None:
        raise ValueError(f"{type(objective).__name__} needs a flow head, this model is of text alone; set heads.flow")
    check_blocks(objective, context, one.model.flow.head is not None)
    batch = of_latents(batch) if context.unit == "latent" else batch
    items = one.items(batch, objective.pairing)
    # The average may belong to another objective; this one uses it only if it declares a decay.
    own = one.averages if target_decay_of(objective) else None
    draw = objective.draw(items, key)
    if context.is_joint:
        ends = [~draw.items.trained & (draw.t == end) for end in (0, 1)]
        batch = replace(batch, refine=joined(batch.refine, batch.item, batch.item_names, context, *ends))
    return {"": objective.loss(BatchFlowCall(one.model, batch, one.memory, _ones(batch), own), draw)}


def placeholder_terms(objective: Any, one: ContextPass, key: Key) -> dict[str, Terms]:
    """The terms of the joint-token head, each times the weight of the objective."""
    found = joint_loss(one.model, one.batch, one.hidden, one.memory, objective.blocks, key, one.progress)
    return {f"/{name}": replace(term, weight=term.weight * objective.weight) for name, term in found.items()}


def rollout_terms(objective: Any, one: ContextPass, key: Key) -> dict[str, Terms]:
    """The terms of an objective on blocks that read the model's own samples; count 0 without items."""
    if not one.batch.num_items:
        return one.no_terms(objective)
    if one.scores is None:
        raise ValueError(f"{type(objective).__name__} needs a teacher and a critic; give ScoreNetworks as scores")
    batch, memory = sampled_past(objective, one, key)
    call = BatchFlowCall(one.model, batch, memory, _ones(batch))
    teacher, critic = (_call(model, batch, frozen=True) for model in (one.scores.teacher, one.scores.critic))
    return {"": objective.loss(call, teacher, critic, one.items(batch), key)}


@torch.no_grad()
def sampled_past(objective: Any, one: ContextPass, key: Key) -> tuple[Batch, Memory]:
    """The batch whose blocks read samples of the model in place of their past, and its memory, without a graph.
    ValueError for a batch with features: those of samples are not known."""
    if one.batch.features is not None:
        raise ValueError(
            f"{type(objective).__name__} replaces pictures of the context by samples, and this model also reads the "
            "features of an encoder; leave out heads.encoder, or this objective"
        )
    check_blocks(objective, one.model.block_context)

    def sample(part: Batch, memory: Memory) -> Tensor:
        return objective.sample(BatchFlowCall(one.model, part, memory, _ones(part)), one.items(part), key)

    return own_past(one.batch, one.memory.detach(), sample, lambda batch: one.model.context(batch)[1])


def critic_losses(
    model: TrainedModel, critic: TrainedModel, batch: Batch, objectives: Sequence[Objective], key: Key,
    progress: float = 1.0,
) -> dict[str, Terms]:  # fmt: skip
    """Named terms of the critic of objectives that need one, on samples of the model without a graph; count 0 without
    items."""
    with torch.no_grad():
        one = ContextPass(model, batch, *model.context(batch), None, progress)
    found: dict[str, Any] = {type(each).__name__: each for each in objectives if each.needs_critic}
    if not batch.num_items:
        return {name: one.no_terms(objective)[""] for name, objective in found.items()}
    return {name: _critic_terms(objective, critic, one, key.fold(name)) for name, objective in found.items()}


def _critic_terms(objective: Any, critic: TrainedModel, one: ContextPass, key: Key) -> Terms:
    """The critic's terms of one objective."""
    with torch.no_grad():
        batch, memory = sampled_past(objective, one, key)
        x = objective.sample(BatchFlowCall(one.model, batch, memory, _ones(batch)), one.items(batch), key)
    return objective.critic_loss(_call(critic, batch), x, one.items(batch), key)


def _call(model: TrainedModel, batch: Batch, frozen: bool = False) -> BatchFlowCall:
    """F of a batch, after a context pass of its own. frozen: results have no graph."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        memory = model.context(batch)[1]
    return BatchFlowCall(model, batch, memory, _ones(batch), frozen=frozen)


def _ones(batch: Batch) -> Tensor:
    """(I,): beta of no guidance."""
    return torch.ones(batch.num_items, device=batch.ids.device)


# From the declared input of an objective (Objective.reads) to the function that computes it.
TERMS_BY_INPUT = {
    "logits": logits_terms,
    "flow": flow_terms,
    "placeholders": placeholder_terms,
    "rollout": rollout_terms,
}


def batch_losses(
    model: TrainedModel,
    batch: Batch,
    objectives: Sequence[Objective],
    key: Key,
    averages: TrainedModel | None = None,
    progress: float = 1.0,
    scores: ScoreNetworks | None = None,
) -> dict[str, Terms]:
    """Named (sum, count) terms of each objective; absent modalities have count 0. See Omni.forward. The class names
    terms and noise: ValueError for two objectives of one class. Noise is keyed by the class name: renaming a class
    changes its noise."""
    one = ContextPass(model, batch, *model.context(batch), averages, progress, scores)
    names = [type(objective).__name__ for objective in objectives]
    if len(set(names)) < len(names):
        raise ValueError(
            f"two objectives of one class in {names} would have one loss between them; keep one, or make a subclass"
        )
    terms: dict[str, Terms] = {}
    for name, objective in zip(names, objectives, strict=True):
        found = TERMS_BY_INPUT[objective.reads](objective, one, key.fold(name))
        terms |= {f"{name}{part}": term for part, term in found.items()}
    return terms
