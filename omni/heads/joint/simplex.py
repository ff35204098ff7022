"""Flow maps on the simplex: K tokens are carried together from Gaussian noise to one-hot vectors, in one jump or many.

The framework's flow maps (t = 1 noise, t = 0 data) on K one-hot vectors instead of latents: x_t = (1 - t) c e + t z
for each token, e one-hot of V, z normal of V numbers, c the `scale` (arXiv 2602.16813, 2602.12233, 2604.09784). Of x_t
the network reads one law a token, the endpoint D(x, t, s), and

    F(x, t, s) = (x - c D) / t        jump  x - (t - s) F = (s / t) x + (1 - s / t) c D

On the diagonal s = t, D is the posterior of each token given all of x_t. Off it, D is the mean of the diagonal's laws
along the path from t to s, in the measure da, a = c (1 - t) / t: a law again, so the simplex is never left and
cross-entropy can compare. At s = 0 it is the one-hot vector where the path ends: one pass is argmax D(z, 1, 0). The
tokens of a block depend on one another because noise is transported, jointly, to strings; nothing is drawn token by
token, so there are no laws of the draw, no conditionals and no likelihood.

Scale. In y = x / t the path is z + a e and dy / da = D: the map from noise to ids is the same for every c, which only
says where in the clock things happen. Among V one-hots argmax x_t begins to say the right id about a = sqrt(2 log V),
so with c of that size (the default) in the middle of the clock, with c = 1 late, at t = 1 / (1 + sqrt(2 log V)).

Every position of the block is seen by the others, so a block that ends early needs a state past its end: there it
repeats its last id.

Legend: B blocks, K tokens, V vocabulary, W width.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

import omni.samplers  # noqa: F401  (registration)
from omni.config import Frozen
from omni.heads.flow import FlowHeadConfig, ScalarEmbedding
from omni.heads.joint.base import JOINT_HEADS, Draft, JointCall, JointHead, Lesson
from omni.heads.joint.noise_kinds import TINY
from omni.heads.joint.simplex_loss import flow_objective, flow_terms, semigroup_terms
from omni.rng import Key
from omni.samplers.schedule import SAMPLERS, time_grid
from omni.terms import Terms

ClockKind = Literal["decoding", "uniform"]


class SimplexConfig(Frozen):
    """scale: c, of the one-hots; None: sqrt(2 log V). See the head of this file.

    clock: what the steps of sampling are equally long in, and the times of the objective "simplex" uniform: t itself,
    or the share of ids that argmax x_t gets wrong ("decoding", arXiv 2602.16813).
    sampler: jumps D(x, t, s), or Euler steps along the diagonal D(x, t, t), which only many of make right.
    objective: "simplex", cross-entropy of both (see simplex_loss), or the name of one of the framework's flow
    objectives, of F; `objective_options`: its options. min_time: of F in the latter, whose t is held above it.
    semigroup_share: of blocks that learn jumps instead of the diagonal, from the share `semigroup_from` of training on;
    before, there is little for jumps to be made of, and a step takes one pass instead of three. semigroup_weight: of
    their term.
    num_frequencies: of the sinusoids that show t and t - s to the placeholders.
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
    """u in [0, 1] -> t: 0 is data and 1 noise on both."""

    def __init__(self, kind: ClockKind, scale: float, vocab_size: int) -> None:
        self.table: tuple[Tensor, Tensor] | None = None
        if kind == "decoding":
            a = torch.linspace(math.sqrt(2 * math.log(vocab_size)) + 8, 0, 4001, dtype=torch.float64, device="cpu")
            error = decoding_error(a, vocab_size)
            kept = error > 1e-9
            zero = error.new_zeros(1)
            self.table = torch.cat([zero, error[kept] / error[-1]]), torch.cat([zero, 1 / (1 + a[kept] / scale)])

    def time(self, u: Tensor) -> Tensor:
        """Same shape, float64."""
        if self.table is None:
            return u
        known, times = self.table
        i = torch.searchsorted(known, u).clamp(1, len(known) - 1)
        part = (u - known[i - 1]) / (known[i] - known[i - 1])
        return (1 - part) * times[i - 1] + part * times[i]


def decoding_error(a: Tensor, vocab_size: int) -> Tensor:
    """(n,) float64: how often argmax(a e + z) is not the id of e among V, 1 - E Phi(z + a)^(V - 1)."""
    z = torch.linspace(-9, 9, 721, dtype=torch.float64, device=a.device)
    density = torch.exp(-(z**2) / 2)
    right = torch.exp((vocab_size - 1) * torch.special.log_ndtr(a.unsqueeze(-1) + z))
    return 1 - right @ (density / density.sum())


@JOINT_HEADS.register("simplex")
class Simplex(JointHead):
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
        """The matrix before the read-out at zero."""
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
        """(B, K, W): x by the model's own embedding of ids, scaled to a mean square of about one, and the times."""
        table = call.embed(torch.arange(self.vocab_size, device=x.device))
        at = t.view(-1, 1, 1)
        size = ((self.scale * (1 - at)) ** 2 + self.vocab_size * at**2).sqrt()
        spread = table.detach().float().pow(2).mean().sqrt()
        shown = (x / size).to(table.dtype) @ (table / spread.to(table.dtype))
        times = (self.time(t) + self.gap(t - s)).unsqueeze(1)
        return self.placeholder + nn.functional.linear(shown, self.enter.weight.to(shown.dtype)) + times

    # ---- the contract ---------------------------------------------------------------------------------------------

    def sample(self, call: JointCall, uniforms: Tensor, key: Key, passes: int = 1) -> Draft:
        """See the contract; any number of `passes`, one for each step. The first number of a token's noise is the
        normal quantile of its uniform, the others, and all of positions past the uniforms, are keyed: fewer uniforms
        than K give the first tokens of a whole block."""
        n, B = self.fits(uniforms), len(uniforms)
        self.check_passes(passes, n)
        even = torch.tensor(time_grid(passes), dtype=torch.float64)
        times = time_grid(passes, grid=self.clock.time(even).tolist())
        noise = key.fold("noise").normal((B, self.length, self.vocab_size), torch.float64).to(uniforms.device)
        noise[:, :n, 0] = torch.special.ndtri(uniforms.double().clamp(TINY, 1 - TINY))

        def velocity(x: Tensor, t: float, s: float) -> Tensor:
            law = self.log_endpoint(call, x, x.new_full((B,), t), x.new_full((B,), s)).exp()
            return (x - self.scale * law) / t

        *_, last = SAMPLERS.get(self.config.sampler)(velocity, noise, times)
        return Draft(last.x.argmax(-1)[:, :n])

    def loss(self, call: JointCall, lesson: Lesson) -> dict[str, Terms]:
        return semigroup_terms(self, call, lesson) if self.objective is None else flow_terms(self, call, lesson)
