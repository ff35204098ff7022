"""The losses of a flow map on the simplex: its own, and the framework's flow objectives on its F.

Own ("simplex"). A block learns the diagonal, or a jump from t to s by way of m, s < m < t:

    diagonal    cross-entropy of D(x_t, t, t) to the data
    semigroup   divergence of D(x_t, t, s) from the law that two jumps of the target make of it,
                D* = w D(x_t, t, m) + (1 - w) D(x_m, m, s),  x_m the landing of the first,  w = s (t - m) / (m (t - s))

D* follows from the two jumps being one, and is convex: in a = c (1 - t) / t, w = (a_m - a_t) / (a_s - a_t). At s = 0
w = 0, and D is the consistency model of the end. One pass with a graph carries both kinds of block, and two without a
graph make the targets. The semigroup's value is zero where any two jumps are one.

Legend: B blocks, K tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import omni.objectives  # noqa: F401  (registration)
from omni.heads.flow import average_velocity
from omni.heads.joint.base import JointCall, Lesson
from omni.heads.joint.noise_kinds import draws_of
from omni.objectives.base import OBJECTIVES, FlowCall, FlowObjective, Items
from omni.rng import Key
from omni.terms import Terms

if TYPE_CHECKING:
    from omni.heads.joint.simplex import Simplex

# ---- what both share -----------------------------------------------------------------------------------------------


def block_items(head: Simplex, lesson: Lesson, dtype: torch.dtype) -> tuple[Items, Tensor]:
    """Blocks as the framework's noisy items, of K one-hots c e, and their ids (B, K): past its end a block repeats its
    last id, and counts. Blocks without any id are padding."""
    blocks = lesson.blocks
    last = (blocks.valid.sum(-1, keepdim=True) - 1).clamp(min=0)
    ids = torch.where(blocks.valid, blocks.ids, blocks.ids.gather(1, last))
    there = blocks.valid.any(-1, keepdim=True)
    number = torch.arange(len(ids), device=ids.device).unsqueeze(-1)
    onehot = torch.nn.functional.one_hot(ids, head.vocab_size).to(dtype) * head.scale
    item = torch.where(there, number, -1).expand_as(ids)
    return Items(onehot, item, blocks.names, progress=lesson.progress), ids


def _precision(head: Simplex) -> torch.dtype:
    """Of states: single or better."""
    return torch.promote_types(head.decoder.dtype, torch.float32)


# ---- its own -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What the pass with a graph is asked: states x (B, K, V) at t that jump to s (B,), and the laws D (B, K, V) it
    should say. `jumps` (B,): whose laws are the semigroup's; the others' are one-hot, of the data."""

    x: Tensor
    t: Tensor
    s: Tensor
    laws: Tensor
    jumps: Tensor
    there: Tensor  # (B, K) bool


def semigroup_terms(head: Simplex, call: JointCall, lesson: Lesson) -> dict[str, Terms]:
    return graded(head, call, set_task(head, call, lesson))


@torch.no_grad()
def set_task(head: Simplex, call: JointCall, lesson: Lesson) -> Task:
    items, ids = block_items(head, lesson, _precision(head))
    share = head.config.semigroup_share if lesson.progress >= head.config.semigroup_from else 0.0
    t, m, s, jumps = times_of(head, draws_of(lesson.blocks.names, (6,), lesson.key.fold("times")), share)
    [t, m, s] = items.times(t, m, s)
    jumps = jumps.to(ids.device)
    x = items.interpolate(items.noise(lesson.key), t)
    laws = torch.nn.functional.one_hot(ids, head.vocab_size).to(x.dtype)
    if share:
        said = semigroup_law(head, call.target(), x, t, m, s)
        laws = torch.where(jumps.view(-1, 1, 1), said.to(x.dtype), laws)
    return Task(x, t, s, laws, jumps, items.mask)


def times_of(head: Simplex, draws: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """t, m, s (B,) float64 and which blocks jump, of draws (B, 6). In the head's clock the two ends of a jump are
    uniform; half of the jumps go to the end, and half of those set out from noise."""
    jumps = draws[:, 0] < share
    start, end = draws[:, 1:3].max(-1).values, draws[:, 1:3].min(-1).values
    to_end = draws[:, 3] < 0.5
    end = torch.where(to_end, 0.0, end)
    start = torch.where(to_end & (draws[:, 5] < 0.5), 1.0, start)
    middle = end + (start - end) * draws[:, 4].clamp(1e-3, 1 - 1e-3)
    t = torch.where(jumps, start, draws[:, 1])
    return (
        head.clock.time(t),
        head.clock.time(torch.where(jumps, middle, t)),
        head.clock.time(torch.where(jumps, end, t)),
        jumps,
    )


@torch.no_grad()
def semigroup_law(head: Simplex, call: JointCall, x: Tensor, t: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """(B, K, V) D* of x (B, K, V), by way of m: two passes of `call`. Where t = m = s it means nothing."""
    tiny = torch.finfo(x.dtype).tiny
    first = head.log_endpoint(call, x, t, m).exp()
    stay = (m / t.clamp(min=tiny)).view(-1, 1, 1)
    second = head.log_endpoint(call, stay * x + (1 - stay) * head.scale * first, m, s).exp()
    share = (s * (t - m) / (m * (t - s)).clamp(min=tiny)).view(-1, 1, 1)
    return share * first + (1 - share) * second


def graded(head: Simplex, call: JointCall, task: Task) -> dict[str, Terms]:
    """One pass, and its terms. Nothing here is drawn."""
    log_d = head.log_endpoint(call, task.x, task.t, task.s)
    miss = (torch.special.xlogy(task.laws, task.laws) - task.laws * log_d).sum(-1)
    jumps = task.jumps.unsqueeze(-1)
    terms = {"diagonal": _term(miss, task.there & ~jumps, 1.0)}
    if head.config.semigroup_share:
        terms["semigroup"] = _term(miss, task.there & jumps, head.config.semigroup_weight)
    return terms


def _term(miss: Tensor, where: Tensor, weight: float) -> Terms:
    return Terms((miss * where).sum(), float(where.sum()), weight)


# ---- the framework's ------------------------------------------------------------------------------------------------


def flow_terms(head: Simplex, call: JointCall, lesson: Lesson) -> dict[str, Terms]:
    """The objective of that name on F, over blocks of K one-hots of V channels."""
    assert head.objective is not None
    items, _ = block_items(head, lesson, _precision(head))
    flow = BlockFlow(velocity_of(head, call), lambda: velocity_of(head, call.target()))
    return {head.config.objective: head.objective.loss(flow, head.objective.draw(items, lesson.key))}


AverageVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]
NO_DERIVATIVE = "it takes derivatives along the path, which joint-token heads do not have"


def velocity_of(head: Simplex, call: JointCall) -> AverageVelocity:
    def velocity(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        law = head.log_endpoint(call, x, t, s).exp()
        return average_velocity(head.scale * law, x, t.view(-1, 1, 1), "x", head.config.min_time)

    return velocity


class BlockFlow:
    """F of a head as objectives see it (objectives.base.FlowCall): values, and the present weights as the target."""

    def __init__(self, velocity: AverageVelocity, frozen: Callable[[], AverageVelocity]) -> None:
        self.velocity, self.frozen = velocity, frozen

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return self.velocity(x, t, s)

    def target(self, graph: bool = False) -> FlowCall:
        if graph:
            return self
        velocity = self.frozen()

        @torch.no_grad()
        def without_graph(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return velocity(x, t, s)

        return BlockFlow(without_graph, lambda: velocity)

    def derivative(self, x: Tensor, t: Tensor, s: Tensor, dx: Tensor, dt: Tensor, ds: Tensor) -> Tensor:
        raise ValueError(NO_DERIVATIVE)

    def with_derivative(
        self, x: Tensor, t: Tensor, s: Tensor, dx: Tensor, dt: Tensor, ds: Tensor
    ) -> tuple[Tensor, Tensor]:
        raise ValueError(NO_DERIVATIVE)

    def null(self) -> AverageVelocity:
        raise ValueError("it is guided by null contexts, which blocks of tokens do not have")

    def guided(self, beta: Tensor) -> FlowCall:
        raise ValueError("it tells the network its guidance, which joint-token heads do not take")


def flow_objective(name: str, options: Mapping[str, Any]) -> FlowObjective:
    """The objective of that name with its options, its target being the present weights. ValueError where it wants
    what a joint-token head cannot give: tried out on two blocks."""
    kind = OBJECTIVES.get(name)
    if not (isinstance(kind, type) and issubclass(kind, FlowObjective)):
        raise ValueError(f'objective {name!r} is none of flows; take "simplex" or, for one, "shortcut"')
    given = dict(options)
    if "target_decay" in kind.model_fields and given.setdefault("target_decay", None):
        raise ValueError(
            f"target_decay = {given['target_decay']}: no average of a joint-token head's weights is kept; leave it "
            "out, and the present weights serve"
        )
    objective = kind(**given)
    field: AverageVelocity = lambda x, t, s: x  # noqa: E731
    items = Items(torch.ones(2, 1, 2), torch.tensor([[0], [1]]), ((0, 0, 0), (1, 0, 0)))
    try:
        objective.loss(BlockFlow(field, lambda: field), objective.draw(items, Key(0)))
    except ValueError as error:
        raise ValueError(
            f'the flow objective {name!r} cannot train a simplex head: {error}; take "simplex", "flow_matching", '
            '"shortcut" or "consistency_trajectory"'
        ) from error
    return objective
