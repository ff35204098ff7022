"""Flow maps on the simplex: they map K tokens jointly from Gaussian noise to one-hot vectors, in one or more jumps.

The framework's flow maps (t = 1 noise, t = 0 data) on K one-hot vectors instead of latents: x_t = (1 - t) c e + t z
for each token, e one-hot of V, z normal of V numbers, c the `scale` (arXiv 2602.16813, 2602.12233, 2604.09784). From
x_t the network predicts one distribution a token, the endpoint D(x, t, s), and

    F(x, t, s) = (x - c D) / t        jump  x - (t - s) F = (s / t) x + (1 - s / t) c D

On the diagonal s = t, D is the posterior of each token given all of x_t. Off it, D is the mean of the diagonal's
distributions along the path from t to s, in the measure da, a = c (1 - t) / t. That is a distribution too: D stays on
the simplex, and cross-entropy applies. At s = 0 it is the one-hot vector at the end of the path: one pass gives
argmax D(z, 1, 0). The tokens of a block are dependent because the map is joint. Tokens are not sampled one by one, so
there are no probabilities of the sample, no conditionals and no likelihood.

Scale. In y = x / t the path is z + a e and dy / da = D: the map from noise to ids does not depend on c, which only sets
the times of the transitions. Among V one-hots, argmax x_t becomes right near a = sqrt(2 log V): with c of that size
(the default) at the middle of the clock; with c = 1 late, at t = 1 / (1 + sqrt(2 log V)).

All positions of a block see one another, so a block that ends early needs a state past its end: it repeats its last id.

Loss. The framework's flow objectives on F, or the head's own ("simplex"). A block trains the diagonal, or a jump from t
to s through m, s < m < t:

    diagonal    cross-entropy of D(x_t, t, t) to the data
    semigroup   divergence of D(x_t, t, s) from the distribution of two jumps of the target,
                D* = w D(x_t, t, m) + (1 - w) D(x_m, m, s),  x_m the end of the first,  w = s (t - m) / (m (t - s))

D* equates one jump with the two, and is convex: in a, w = (a_m - a_t) / (a_s - a_t). At s = 0, w = 0, and D is a
consistency model. One pass with a graph serves both kinds of block; two without a graph make the targets. The
semigroup's value is zero where any two jumps equal one.

Legend: B blocks of tokens, K tokens, V vocabulary, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from omni.config import Frozen
from omni.heads.flow import FlowHeadConfig, ScalarEmbedding, average_velocity
from omni.heads.joint.base import JOINT_HEADS, Draft, JointCall, JointHead, LossInputs
from omni.heads.joint.noise_kinds import TINY, uniforms_by_name
from omni.objectives.base import OBJECTIVES, FlowCall, FlowObjective, Items
from omni.objectives.terms import Terms
from omni.rng import Key
from omni.samplers import SAMPLERS, run_sampler, time_grid

# ---- shared by both losses -----------------------------------------------------------------------------------------


ClockKind = Literal["decoding", "uniform"]


class SimplexConfig(Frozen):
    """scale: c, of the one-hots; None: sqrt(2 log V). See the module docstring.

    clock: sampling steps are equal, and the times of the objective "simplex" uniform, in t itself ("uniform") or in the
    share of ids that argmax x_t gets wrong ("decoding", arXiv 2602.16813).
    sampler: jumps D(x, t, s), or Euler steps along the diagonal D(x, t, t), which need many steps.
    objective: "simplex", cross-entropy of both (see above), or the name of one of the framework's flow objectives, on
    F;
    `objective_options`: its options. min_time: for the latter, the smallest t in F.
    semigroup_share: of blocks that train jumps instead of the diagonal, after the share `semigroup_from` of training.
    Before, jumps have no useful targets, and a step takes one pass instead of three. semigroup_weight: of their term.
    num_frequencies: of the sinusoids that embed t and t - s.
    """

    scale: float | None = Field(default=None, gt=0)
    clock: ClockKind = "decoding"
    sampler: Literal["flow_map", "euler"] = "flow_map"
    objective: str = "simplex"
    objective_options: dict[str, Any] = Field(default_factory=dict)
    min_time: float = Field(default=0.05, gt=0, le=1)
    semigroup_share: float = Field(default=0.5, ge=0, lt=1)
    semigroup_from: float = Field(default=0.25, ge=0, lt=1)
    semigroup_weight: float = Field(default=1.0, gt=0)
    num_frequencies: int = Field(default=16, ge=1, le=1 << 16)

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> SimplexConfig:
        given = self.model_fields_set
        simplex, jumps = self.objective == "simplex", {"semigroup_from", "semigroup_weight"}
        for name in sorted(given & ({"objective_options", "min_time"} if simplex else {"semigroup_share", *jumps})):
            raise ValueError(f"{name} has no effect with objective = {self.objective!r}: leave it out")
        for name in sorted(given & jumps if self.semigroup_share == 0 else ()):
            raise ValueError(f"{name} has no effect where semigroup_share is 0: leave it out")
        return self


class Clock:
    """u in [0, 1] -> t: 0 is data and 1 noise on both. table: known (u, t) pairs, interpolated; None: t = u."""

    def __init__(self, kind: ClockKind, scale: float, vocab_size: int) -> None:
        self.table: tuple[Tensor, Tensor] | None = None
        if kind == "decoding":
            a = torch.linspace(math.sqrt(2 * math.log(vocab_size)) + 8, 0, 4001, dtype=torch.float64, device="cpu")
            error = decoding_error(a, vocab_size)
            kept = error > 1e-9
            zero = error.new_zeros(1)
            self.table = torch.cat([zero, error[kept] / error[-1]]), torch.cat([zero, 1 / (1 + a[kept] / scale)])

    def time(self, u: Tensor) -> Tensor:
        """t of u, of the same shape, float64."""
        if self.table is None:
            return u
        known, times = self.table
        i = torch.searchsorted(known, u).clamp(1, len(known) - 1)
        part = (u - known[i - 1]) / (known[i] - known[i - 1])
        return (1 - part) * times[i - 1] + part * times[i]


def decoding_error(a: Tensor, vocab_size: int) -> Tensor:
    """(n,) float64: the probability that argmax(a e + z) is not the id of e among V, 1 - E Phi(z + a)^(V - 1)."""
    z = torch.linspace(-9, 9, 721, dtype=torch.float64, device=a.device)
    density = torch.exp(-(z**2) / 2)
    right = torch.exp((vocab_size - 1) * torch.special.log_ndtr(a.unsqueeze(-1) + z))
    return 1 - right @ (density / density.sum())


@JOINT_HEADS.register("simplex")
class Simplex(JointHead):
    """Flow maps on K one-hot vectors (module docstring). Names of weights are stored: never rename them."""

    layout, universal, passes, order = "block", True, "any", "any"
    Config = SimplexConfig
    config: SimplexConfig

    def __init__(self, config: SimplexConfig, length: int, vocab_size: int, width: int) -> None:
        super().__init__(config, length, vocab_size, width)
        self.scale = config.scale or math.sqrt(2 * math.log(vocab_size))
        self.clock = Clock(config.clock, self.scale, vocab_size)
        simplex = config.objective == "simplex"
        self.objective = None if simplex else flow_objective(config.objective, config.objective_options)
        self.placeholder = nn.Parameter(torch.zeros(width))
        self.enter = nn.Linear(width, width, bias=False)
        sinusoids = FlowHeadConfig(num_frequencies=config.num_frequencies)
        self.time, self.gap = (ScalarEmbedding(width, sinusoids, 1.0) for _ in range(2))
        self.decoder = nn.Parameter(torch.zeros(width, width))

    def initialise(self, key: Key) -> None:
        """The matrix before the output projection starts at zero."""
        super().initialise(key)
        torch.nn.init.zeros_(self.decoder)

    # ---- one pass -------------------------------------------------------------------------------------------------

    def log_endpoint(self, call: JointCall, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """(B, K, V) log D(x, t, s) of states x (B, K, V) and times t, s (B,), in single precision or better. One
        pass."""
        hidden = call(self.placeholders(call, x, t, s), causal=False)[:, 1:]
        logits = call.read(hidden + nn.functional.linear(hidden, self.decoder.to(hidden.dtype)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def placeholders(self, call: JointCall, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """(B, K, W): x in the model's own embedding of ids, scaled to a mean square of about one, plus the times."""
        table = call.embed(torch.arange(self.vocab_size, device=x.device))
        at = t.view(-1, 1, 1)
        size = ((self.scale * (1 - at)) ** 2 + self.vocab_size * at**2).sqrt()
        spread = table.detach().float().pow(2).mean().sqrt()
        shown = (x / size).to(table.dtype) @ (table / spread.to(table.dtype))
        times = (self.time(t) + self.gap(t - s)).unsqueeze(1)
        return self.placeholder + nn.functional.linear(shown, self.enter.weight.to(shown.dtype)) + times

    # ---- the contract ---------------------------------------------------------------------------------------------

    def sample(self, call: JointCall, uniforms: Tensor, key: Key, passes: int = 1) -> Draft:
        """See the contract; any number of `passes`, one per step. The first number of a token's noise is the normal
        quantile of its uniform. All others, and those of positions past the uniforms, are keyed: fewer uniforms than K
        give the first tokens of a whole block."""
        n, B = self.num_tokens(uniforms), len(uniforms)
        self.check_passes(passes, n)
        even = torch.tensor(time_grid(passes), dtype=torch.float64)
        times = time_grid(passes, grid=self.clock.time(even).tolist())
        noise = key.fold("noise").normal((B, self.length, self.vocab_size), torch.float64).to(uniforms.device)
        noise[:, :n, 0] = torch.special.ndtri(uniforms.double().clamp(TINY, 1 - TINY))

        def velocity(x: Tensor, t: float, s: float) -> Tensor:
            probs = self.log_endpoint(call, x, x.new_full((B,), t), x.new_full((B,), s)).exp()
            return (x - self.scale * probs) / t

        *_, last = run_sampler(SAMPLERS.get(self.config.sampler), velocity, noise, times)
        return Draft(last.x.argmax(-1)[:, :n])

    def loss(self, call: JointCall, inputs: LossInputs) -> dict[str, Terms]:
        return semigroup_terms(self, call, inputs) if self.objective is None else flow_terms(self, call, inputs)


def block_items(head: Simplex, inputs: LossInputs, dtype: torch.dtype) -> tuple[Items, Tensor]:
    """Blocks as the framework's noisy items, of K one-hots c e, and their ids (B, K). Past its end a block repeats its
    last id, which counts. Blocks without ids are padding."""
    blocks = inputs.blocks
    last = (blocks.valid.sum(-1, keepdim=True) - 1).clamp(min=0)
    ids = torch.where(blocks.valid, blocks.ids, blocks.ids.gather(1, last))
    there = blocks.valid.any(-1, keepdim=True)
    number = torch.arange(len(ids), device=ids.device).unsqueeze(-1)
    onehot = torch.nn.functional.one_hot(ids, head.vocab_size).to(dtype) * head.scale
    item = torch.where(there, number, -1).expand_as(ids)
    return Items(onehot, item, blocks.names, progress=inputs.progress), ids


def _precision(head: Simplex) -> torch.dtype:
    """The dtype of states: single or better."""
    return torch.promote_types(head.decoder.dtype, torch.float32)


# ---- the head's loss ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets:
    """Inputs and targets of the pass with a graph: states x (B, K, V) at t that jump to s (B,), and target
    distributions D (B, K, V). `jumps` (B,): blocks with the semigroup's targets; the others' are one-hot, of the
    data."""

    x: Tensor
    t: Tensor
    s: Tensor
    probs: Tensor
    jumps: Tensor
    there: Tensor  # (B, K) bool: positions of blocks that have ids


def semigroup_terms(head: Simplex, call: JointCall, inputs: LossInputs) -> dict[str, Terms]:
    """The terms "diagonal" and "semigroup" of the head's own loss."""
    return terms_of(head, call, build_targets(head, call, inputs))


@torch.no_grad()
def build_targets(head: Simplex, call: JointCall, inputs: LossInputs) -> Targets:
    """States at keyed times, and the distributions that they train: the data, or two jumps of the target."""
    items, ids = block_items(head, inputs, _precision(head))
    share = head.config.semigroup_share if inputs.progress >= head.config.semigroup_from else 0.0
    t, m, s, jumps = jump_times(head, uniforms_by_name(inputs.blocks.names, (6,), inputs.key.fold("times")), share)
    [t, m, s] = items.times(t, m, s)
    jumps = jumps.to(ids.device)
    x = items.interpolate(items.noise(inputs.key), t)
    probs = torch.nn.functional.one_hot(ids, head.vocab_size).to(x.dtype)
    if share:
        target = semigroup_target(head, call.target(), x, t, m, s)
        probs = torch.where(jumps.view(-1, 1, 1), target.to(x.dtype), probs)
    return Targets(x, t, s, probs, jumps, items.mask)


def jump_times(head: Simplex, draws: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """share: of blocks that jump, start t over middle m to end s; the others have t = m = s. Returns t, m, s (B,)
    float64, and which blocks jump. Half of the jumps end at 0, and half of those start from noise; times are in the
    head's clock.
    Columns of `draws` (B, 6) in [0, 1): jumps or not, two ends (the first is t without a jump), end at 0, middle, start
    at noise."""
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
def semigroup_target(head: Simplex, call: JointCall, x: Tensor, t: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """(B, K, V) D* of x (B, K, V), through m: two passes of `call`. Undefined where t = m = s."""
    tiny = torch.finfo(x.dtype).tiny
    first = head.log_endpoint(call, x, t, m).exp()
    stay = (m / t.clamp(min=tiny)).view(-1, 1, 1)
    second = head.log_endpoint(call, stay * x + (1 - stay) * head.scale * first, m, s).exp()
    share = (s * (t - m) / (m * (t - s)).clamp(min=tiny)).view(-1, 1, 1)
    return share * first + (1 - share) * second


def terms_of(head: Simplex, call: JointCall, targets: Targets) -> dict[str, Terms]:
    """The terms of `targets`, from one pass with a graph. Not random."""
    log_d = head.log_endpoint(call, targets.x, targets.t, targets.s)
    miss = (torch.special.xlogy(targets.probs, targets.probs) - targets.probs * log_d).sum(-1)
    jumps = targets.jumps.unsqueeze(-1)
    terms = {"diagonal": _term(miss, targets.there & ~jumps, 1.0)}
    if head.config.semigroup_share:
        terms["semigroup"] = _term(miss, targets.there & jumps, head.config.semigroup_weight)
    return terms


def _term(miss: Tensor, where: Tensor, weight: float) -> Terms:
    """The sum of `miss` (B, K) where `where` (B, K) is true, and their number."""
    return Terms((miss * where).sum(), float(where.sum()), weight)


# ---- flow objectives ------------------------------------------------------------------------------------------------


def flow_terms(head: Simplex, call: JointCall, inputs: LossInputs) -> dict[str, Terms]:
    """The named objective on F, over blocks of K one-hots of V channels."""
    assert head.objective is not None
    items, _ = block_items(head, inputs, _precision(head))
    flow = BlockFlow(velocity_of(head, call), lambda: velocity_of(head, call.target()))
    return {head.config.objective: head.objective.loss(flow, head.objective.draw(items, inputs.key))}


AverageVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]
NO_DERIVATIVE = "it needs derivatives along the path, which joint-token heads do not have"


def velocity_of(head: Simplex, call: JointCall) -> AverageVelocity:
    """F(x, t, s) of the head, from its endpoint D."""

    def velocity(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        probs = head.log_endpoint(call, x, t, s).exp()
        return average_velocity(head.scale * probs, x, t.view(-1, 1, 1), "x", head.config.min_time)

    return velocity


class BlockFlow:
    """F of a head for objectives (objectives.base.FlowCall): values only; the target network has the present
    weights."""

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
        raise ValueError("it needs null contexts, which blocks of tokens do not have")

    def guided(self, beta: Tensor) -> FlowCall:
        raise ValueError("it needs a guidance embedding, which joint-token heads do not have")


def flow_objective(name: str, options: Mapping[str, Any]) -> FlowObjective:
    """The named objective with its options; its target network has the present weights. ValueError if it needs what a
    joint-token head does not have: tested on two blocks."""
    kind = OBJECTIVES.get(name)
    if not (isinstance(kind, type) and issubclass(kind, FlowObjective)):
        raise ValueError(f'objective {name!r} is not a flow objective; use "simplex" or, for example, "shortcut"')
    given = dict(options)
    if "target_decay" in kind.model_fields and given.setdefault("target_decay", None):
        raise ValueError(
            f"target_decay = {given['target_decay']}: joint-token heads have no averaged weights; leave it out to use "
            "the present weights"
        )
    objective = kind(**given)
    field: AverageVelocity = lambda x, t, s: x  # noqa: E731
    items = Items(torch.ones(2, 1, 2), torch.tensor([[0], [1]]), ((0, 0, 0), (1, 0, 0)))
    try:
        objective.loss(BlockFlow(field, lambda: field), objective.draw(items, Key(0)))
    except ValueError as error:
        raise ValueError(
            f'the flow objective {name!r} cannot train a simplex head: {error}; use "simplex", "flow_matching", '
            '"shortcut" or "consistency_trajectory"'
        ) from error
    return objective
