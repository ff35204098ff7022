"""Shared by objectives: the callable that they train, keyed noise, means per item. Losses are `terms.Terms`.

Time: t = 1 is noise, t = 0 data, s <= t. x_t = (1 - t) x0 + t eps, v = eps - x0, jump x + (s - t) F.

Legend: R batch rows, S refine positions, C channels, I items (noisy copies of blocks).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, Self, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omni.config import Frozen
from omni.objectives.level_times import LevelTimeDistribution
from omni.objectives.pairing import Pairing, transport
from omni.objectives.terms import Terms
from omni.objectives.times import Name, TimeDistribution, keys_I
from omni.registry import Registry
from omni.rng import Key, normals
from omni.sequence.block_context import BlockContext

# Inputs of a loss, which omni.losses computes (TERMS_BY_INPUT).
Reads = Literal["logits", "flow", "placeholders", "rollout"]

# Values of F that training determines, by the names of samplers.base.Reads: F(x, t, t); F(x, t, s) from one time of a
# grid to the next; for any s <= t; F(x, t, 0).
Trains = Literal["velocity", "grid_jumps", "jumps", "data_jumps"]


class FlowCall(Protocol):
    """F(x, t, s): x (R, S, C); t, s (I,); returns (R, S, C). Closes over a network and the context of every item."""

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor: ...

    def derivative(self, x: Tensor, t: Tensor, s: Tensor, dx: Tensor, dt: Tensor, ds: Tensor) -> Tensor:
        """d/dh F(x + h dx, t + h dt, s + h ds) at h = 0, without a graph (for stop-gradient targets)."""
        ...

    def with_derivative(
        self, x: Tensor, t: Tensor, s: Tensor, dx: Tensor, dt: Tensor, ds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(F, its derivative as above), both with a graph: gradients flow through the tangent too."""
        ...

    def target(self, graph: bool = False) -> FlowCall:
        """The target network: averaged weights if the trainer keeps them (see `Objective.target_decay`), else the
        present ones. Without `graph` its results have no graph; with `graph` gradients reach x and the weights."""
        ...

    def null(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """F(x, t, s) of the same items without their condition and without guidance. ValueError if the batch has no
        null contexts."""
        ...

    def guided(self, beta: Tensor) -> FlowCall:
        """The same call with the guidance embedding of beta = 1 / w (I,) for each item; 1, the default, is no
        guidance."""
        ...


@dataclass(frozen=True)
class Items:
    """The noisy copies of a batch: clean latents, and the copy of each position (-1: padding)."""

    latents: Tensor  # (R, S, C)
    item: Tensor  # (R, S)
    names: Sequence[Name]  # (document, block, copy) of each item
    is_null: Tensor | None = None  # (I,) bool: items without their condition; None: all have it
    progress: float = 1.0  # the completed share of training, for schedules
    pairing: Pairing = "independent"
    trained: Tensor | None = None  # (I,) bool: the items of the loss; None: all

    def __len__(self) -> int:
        return len(self.names)

    def expand(self, value_I: Tensor) -> Tensor:
        """(I,) -> (R, S, 1): each position has the value of its item, in the latents' dtype."""
        return value_I.to(self.latents.dtype)[self.item.clamp(min=0)].unsqueeze(-1)

    @cached_property
    def mask(self) -> Tensor:
        """(R, S) bool: False on padding."""
        return self.item >= 0

    @cached_property
    def counts(self) -> Tensor:
        """(I,) float32: positions of each item."""
        return self.total(torch.ones(self.item.shape, device=self.item.device))

    def total(self, value_RS: Tensor) -> Tensor:
        """(R, S) -> (I,): the sum over each item's positions, in the value's dtype, without padding."""
        index = self.item.clamp(min=0).flatten()
        out = torch.zeros(len(self.names), device=value_RS.device, dtype=value_RS.dtype)
        return out.index_add(0, index, torch.where(self.mask, value_RS, 0).flatten())

    def mean(self, value_RS: Tensor) -> Tensor:
        """(R, S) -> (I,): the mean over each item's positions."""
        return self.total(value_RS) / self.counts.to(value_RS.dtype).clamp(min=1)

    def terms(self, loss_I: Tensor, weight: float, raw_I: Tensor | None = None) -> Terms:
        """A loss per item, as a sum over latents: an item's weight is its number of positions, 0 if it is not trained.
        raw_I: see Terms.raw."""
        trained = self.counts if self.trained is None else self.counts * self.trained
        counts = trained.to(loss_I.dtype)
        raw = None if raw_I is None else (raw_I.detach() * counts).sum()
        return Terms((loss_I * counts).sum(), float(trained.sum()), weight, raw)

    @property
    def mask_of_loss(self) -> Tensor:
        """(R, S) bool: the positions of trained items."""
        return self.mask if self.trained is None else self.mask & self.trained[self.item.clamp(min=0)]

    def flat(self, value_RSC: Tensor) -> Tensor:
        """(R, S, C) -> (I, N, C): every item's positions, in order. ValueError if the items differ in size."""
        sizes = set(self.counts.tolist())
        if len(sizes) > 1:
            raise ValueError(
                f"items of {sorted(int(n) for n in sizes)} latents in one batch; this objective compares whole blocks: "
                "use pictures of one size"
            )
        return value_RSC[self.mask].unflatten(0, (len(self.names), -1))  # items are in flat order (layout.pack)

    def noise(self, key: Key, purpose: str = "noise") -> Tensor:
        """(R, S, C) standard normal, zero on padding. An item's noise depends on (key, document, block, copy) alone.
        The exception is purpose "noise", which is paired with data, under pairing "transport". Another purpose changes
        the noise of every run."""
        device, C = self.latents.device, self.latents.shape[-1]
        if device.type == "mps":  # no float64 there
            return replace(self, latents=self.latents.cpu(), item=self.item.cpu()).noise(key, purpose).to(device)
        if not len(self):
            return torch.zeros_like(self.latents)
        pairs = -(-C // 2)  # each counter gives two numbers
        counter = self.offsets.unsqueeze(-1) * pairs + torch.arange(pairs, device=device)
        keys = keys_I(self.names, key.fold(purpose), device)[self.item.clamp(min=0)]
        drawn = normals(keys.unsqueeze(-1), counter).flatten(-2)[..., :C]
        drawn = torch.where(self.mask.unsqueeze(-1), drawn, 0)
        return self.paired(drawn.to(self.latents.dtype), purpose)

    def paired(self, noise: Tensor, purpose: str) -> Tensor:
        """The noise (R, S, C) reordered by `pairing`; unchanged for other purposes than "noise"."""
        if self.pairing == "independent" or purpose != "noise":
            return noise
        return transport(noise, self.latents, self.item, self.counts)

    @cached_property
    def offsets(self) -> Tensor:
        """(R, S) int64: the index of each position in its item, 0 on padding. The positions of an item are
        contiguous."""
        place = torch.arange(self.item.numel(), device=self.item.device).view_as(self.item)
        index, far = self.item.clamp(min=0), self.item.numel()
        first = torch.full((max(len(self), 1),), far, device=self.item.device)
        first = first.scatter_reduce(0, index.flatten(), torch.where(self.mask, place, far).flatten(), "amin")
        return torch.where(self.mask, place - first[index], 0)

    def times(self, *values_I: Tensor) -> tuple[Tensor, ...]:
        """Sampled times (float64, CPU) -> on the latents' device, in float32 or better: never in half precision."""
        dtype = torch.promote_types(self.latents.dtype, torch.float32)
        return tuple(value.to(self.latents.device, dtype) for value in values_I)

    def interpolate(self, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = (1 - t) x0 + t eps."""
        tt = self.expand(t)
        return (1 - tt) * self.latents + tt * noise


class Objective(Frozen, ABC):
    """An objective with its options.

    `reads`: the input of its loss, see omni.losses: next-token "logits" of supervised positions, a "flow" call with
    items, "placeholders" of joint tokens, or a "rollout": a flow call on the model's own past.

    An objective that uses `FlowCall.target()` has a field (or property) `target_decay: float | None`: the decay of the
    averaged weights that the trainer keeps for it. None, 0 or no such field: the present weights.

    `trains`: the values of F that training determines, the usual ones first; samplers that read others do not fit.
    Its class name keys noise and names losses in logs: never rename a class.
    """

    reads: ClassVar[Reads]
    trains: ClassVar[tuple[Trains, ...]] = ()
    weight: float = 1.0

    @property
    def needs_null(self) -> bool:
        """Whether `loss` uses `FlowCall.null()`; batches must then have null contexts."""
        return False

    @property
    def needs_critic(self) -> bool:
        """Whether the trainer must keep a teacher and a critic for it: see `RolloutObjective`."""
        return False


def target_decay_of(objective: Objective) -> float | None:
    """The objective's `target_decay`; None if it has none. Objective has no default for it: pydantic warns of a field
    that shadows an attribute of a base class."""
    return getattr(objective, "target_decay", None)


class ObjectiveRegistry(Registry[type[Objective]]):
    """Registers classes of objectives."""

    def __init__(self) -> None:
        super().__init__("objective", "omni.objectives", entry_points="omni.objectives")

    def register(self, name: str) -> Callable[[Any], Any]:
        """Decorator for a class of objectives. ValueError for anything else, and for one whose `reads` is missing or
        unknown."""
        add = super().register(name)

        def checked(objective: Any) -> Any:
            if not (isinstance(objective, type) and issubclass(objective, Objective)):
                raise ValueError(f"objective {name!r} must be a subclass of omni.objectives.Objective, got {objective}")
            reads = getattr(objective, "reads", None)
            if reads not in get_args(Reads):
                what = f"objective {name!r}: {objective.__name__}.reads = {reads!r}"
                raise ValueError(f"{what}; set it to one of {', '.join(map(repr, get_args(Reads)))}")
            return add(objective)

        return checked


OBJECTIVES = ObjectiveRegistry()

# Kinds of levels that train no finished block as context.
WITHOUT_FINISHED = ("independent", "nondecreasing", "mid")


@dataclass(frozen=True)
class Draw:
    """Noisy inputs and parts of the target: x_t, v, noise (R, S, C), times t, s (I,). Objectives may extend it."""

    x: Tensor
    v: Tensor
    t: Tensor
    s: Tensor
    items: Items
    noise: Tensor


class FlowObjective(Objective):
    """An objective on latent blocks: `draw` samples noisy inputs, `loss` compares the callable with its target.

    pairing: of noise with data, see objectives.pairing.
    levels: the joint times of neighbouring blocks, in place of `time` and `end`; for models whose noisy blocks read one
    another (sequence.block_context). Objectives with `moves_together` take it; for others it is an error.

    moves_together: where blocks that read one another move in one pass, F of a block is its average velocity while all
    of them move. None: the objective has no rule for that. "any": it has, whatever blocks read. "all": only where every
    block reads all others; see `check_blocks`.
    """

    reads = "flow"
    trains = ("velocity",)
    moves_together: ClassVar[Literal["any", "all"] | None] = None
    time: TimeDistribution = TimeDistribution()
    pairing: Pairing = "independent"
    levels: LevelTimeDistribution | None = None

    @model_validator(mode="after")
    def _levels_have_a_rule(self) -> Self:
        if self.levels is not None:
            if self.moves_together is None:
                raise ValueError(
                    f"{type(self).__name__} has no rule for levels, where several blocks move in one pass; leave it "
                    "out, or take an objective that has one, such as flow_matching or improved_mean_flow"
                )
            if idle := sorted({"time", "end"} & self.model_fields_set):
                raise ValueError(f"{idle[0]} has no effect with levels; give levels.time")
            if self.levels.moves == "one" and "jumps" not in self.trains:
                raise ValueError(
                    f"levels.moves = 'one' has no effect: {type(self).__name__} trains no jumps; leave it out"
                )
        return self

    def times(self, items: Items, key: Key) -> tuple[Tensor, Tensor]:
        """(t, s), each (I,) float64. The base class trains the diagonal s = t."""
        t = self.time.draw(items.names, key)
        return t, t

    def draw(self, items: Items, key: Key) -> Draw:
        """Noisy inputs of the items, keyed by their names."""
        if self.levels is None:
            t, s = items.times(*self.times(items, key))
        else:
            drawn = self.levels.draw_jumps(items.names, key, getattr(self, "diagonal", 1.0))
            t, s = items.times(drawn.t, drawn.s)
            items = replace(items, trained=drawn.trained.to(t.device))
        noise = items.noise(key)
        return Draw(items.interpolate(noise, t), noise - items.latents, t, s, items, noise)

    def turn(self, call: FlowCall, draw: Draw, u: Tensor) -> Tensor:
        """(t - s) d/dt F(x_t, t, s), the total derivative along the velocity u (R, S, C), without a graph.

        With levels, blocks that read one another move together: along the straight path from t to s of all blocks, at
        the speed t - s of each, so this is d/dh F(x + h (t - s) u, t + h (t - s), s) at h = 0, and 0 for a block that
        does not move. For a block that reads no moving block the two are equal.
        """
        zero = torch.zeros_like(draw.s)
        if self.levels is None:
            rate = call.derivative(draw.x, draw.t, draw.s, u, torch.ones_like(draw.t), zero)
            return draw.items.expand(draw.t - draw.s) * rate
        speed = draw.t - draw.s
        rate = call.derivative(draw.x, draw.t, draw.s, draw.items.expand(speed) * u, speed, zero)
        return rate * draw.items.expand(speed != 0)

    @abstractmethod
    def loss(self, call: FlowCall, draw: Draw) -> Terms:
        """The loss of what `draw` returned. It may call `call` any number of times."""


class RolloutObjective(Objective):
    """An objective on samples of blocks that read samples of the model in place of the blocks before them.

    The trainer keeps two networks for it: a frozen `teacher` (a model directory; None: the weights with which training
    begins), and a critic, first a copy of the model, with an optimiser of its own: `critic_steps` updates after each
    update of the model, at `critic_rate` times the recipe's learning rates.
    """

    reads = "rollout"
    teacher: str | None = None
    critic_steps: int = Field(default=1, ge=1)
    critic_rate: float = Field(default=1.0, gt=0)

    @property
    def needs_critic(self) -> bool:
        return True

    @abstractmethod
    def sample(self, call: FlowCall, items: Items, key: Key) -> Tensor:
        """x (R, S, C), float32 or better: a sample of each item, keyed by its name. It also makes the past."""

    @abstractmethod
    def loss(self, call: FlowCall, teacher: FlowCall, critic: FlowCall, items: Items, key: Key) -> Terms:
        """The model's loss. The results of teacher and critic have no graph."""

    @abstractmethod
    def critic_loss(self, critic: FlowCall, x: Tensor, items: Items, key: Key) -> Terms:
        """The critic's loss on samples x (R, S, C), which have no graph."""


def check_blocks(objective: Objective, context: BlockContext, has_head: bool = False) -> None:
    """ValueError, naming the objective, unless it can train a model whose blocks, or latents, read one another as
    `context` defines. has_head: the model has a latent head (heads.latent).

    An objective on the sample's own velocity eps - x0, such as MeanFlow, needs reads "all". With "before", block b
    would learn from E[v_a | x_1..x_b] how an earlier block a moves, but a sampler moves it by E[v_a | x_1..x_a].
    Finished blocks that a sampler reads as context must be context in training too.
    """
    if context.needs_levels and isinstance(objective, RolloutObjective):
        raise ValueError(
            f"{type(objective).__name__} samples block after block, but noisy blocks or latents of this model read one "
            "another; take a model with blocks.reads = 'finished' and unit = 'block'"
        )
    if not isinstance(objective, FlowObjective):
        return
    if has_head and context.unit == "block":
        raise ValueError(
            "flow.head_depth needs blocks.unit = 'latent': all latents of a noisy block have one level here, so none "
            "is known, and the transformer would read none; leave head_depth out"
        )
    if not context.needs_levels:
        if objective.levels is not None and objective.levels.kind != "autoregressive":
            raise ValueError(
                f"{type(objective).__name__}: levels of kind {objective.levels.kind!r} are for blocks that read one "
                "another, but this model's noisy blocks read finished blocks alone; give heads.blocks, such as "
                "{reads = 'before', finished = 'refine'}, or give time in place of levels"
            )
        return
    what = "latents of one block" if context.unit == "latent" else f"noisy blocks (reads = {context.reads!r})"
    name, model = type(objective).__name__, f"a model whose {what} read one another"
    if objective.levels is None:
        raise ValueError(f"{name}: {model} is trained with joint times; give levels, such as {{kind = 'independent'}}")
    if context.is_joint and context.finished == "context" and objective.levels.kind in WITHOUT_FINISHED:
        raise ValueError(
            f"{name} with levels.kind = {objective.levels.kind!r} shows {model} no finished block as context, but a "
            "sampler does; give blocks.finished = 'refine', or levels of kind rolling or autoregressive"
        )
    if context.finished == "refine" and context.context_time and objective.levels.kind not in WITHOUT_FINISHED:
        raise ValueError(
            f"{name} with levels.kind = {objective.levels.kind!r} shows {model} no finished block at "
            f"blocks.context_time = {context.context_time}, but a sampler does; leave that out, or give levels of kind "
            f"{', '.join(WITHOUT_FINISHED)}"
        )
    if objective.moves_together == "all" and context.reads == "before":
        raise ValueError(
            f"{name} cannot train {model}: its tangent has the velocity of each sample, which depends on later blocks; "
            "take improved_mean_flow, flow_matching, or reads = 'all'"
        )
    if objective.needs_null:
        raise ValueError(f"{name}: guidance in training is not implemented for {model}; leave guidance out")
    if has_head and objective.levels.kind != "masked":
        raise ValueError(
            f"{name}: a model with flow.head_depth sees latents as known or masked; give levels = "
            f"{{kind = 'masked', mask_time = {{...}}}}"
        )


def build_objective(name: str, **options: Any) -> Objective:
    """The objective registered as `name`, with validated options. ValueError with the nearest known name."""
    return OBJECTIVES.get(name)(**options)


def jump(call: FlowCall, x: Tensor, t: Tensor, s: Tensor, items: Items) -> Tensor:
    """f(x, t, s) = x + (s - t) F(x, t, s), (R, S, C)."""
    return x + items.expand(s - t) * call(x, t, s)


def squared_error(prediction: Tensor, target: Tensor, items: Items, weight: float) -> Terms:
    """Sum over latents of the channel-mean squared error, in float32 or better; the count is the number of latents."""
    error, mask = channel_error(prediction, target), items.mask_of_loss
    return Terms((error * mask).sum(), float(mask.sum()), weight)


def channel_error(prediction: Tensor, target: Tensor) -> Tensor:
    """(R, S, C) twice -> (R, S): mean over channels of the squared difference, in float32 or better."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(dtype) - target.to(dtype)).pow(2).mean(-1)
