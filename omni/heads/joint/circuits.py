"""Tractable circuits: mixtures with exact marginals. Likelihood, conditionals and samples from one pass.

Token k depends on a latent state z_k of R values. The joint distribution of the states has one of three forms, computed
from the hidden state of the start (Basharin et al., arXiv 2410.17765; multi-token circuits, arXiv 2511.11346):

    cp      one state for the whole block: a mixture of R products
    hmm     a chain with its own transitions at every step
    tree    a balanced binary tree: a span has one state; each half's state is sampled from the parent's by a matrix

The probabilities of a token in a state are the model's own unembedding of a hidden state h + A_kr h + b_kr, initially
near h. They take 8 K R V bytes a block: for bytes, bits and picture codes, not 128k words. CP needs at least 2^(K-1)
states for even parity of K bits; a chain whose tokens depend on the state alone needs 4. A sufficient width does not
imply that training finds the solution (see `anneal`).

`walk` visits the tokens left to right with log P(z_k | x_<k) before each. Conditionals follow from it, and a block that
ends early scores its exact marginal, as later tokens are not visited.

Legend: B blocks of tokens, K tokens, m <= K of them, R states, V vocabulary, W width, r rank of an expander, N
transitions.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from omni.config import Frozen
from omni.heads.joint.base import JOINT_HEADS, Draft, JointCall, JointHead, LogProb, LossInputs
from omni.objectives.terms import Terms
from omni.rng import Key
from omni.samplers.inverse_cdf import inverse_cdf_sample

Visit = Callable[[int, Tensor], Tensor]
"""(k, log P(z_k | x_<k) (B, R)) -> log P(x_k | z_k) (B, R) of the token at k, given or chosen."""

FIRST_POWER = 0.5  # of emissions in responsibilities, at the start of annealing; at its end it is 1


class CircuitConfig(Frozen):
    """num_states: R. expander_rank: r of the matrices A_kr = down up; 0: full, W x W for each of K R.

    noise: the initial distance between states, as a share of h. gamma: the loss weights token k by gamma^(k-1).
    anneal: the share of training with softened responsibilities (see `Circuit.loss`); 0: none.
    balance: weight of the term for equal use of all states; 0: none. Together they avoid optima where two states are
    equal. Set anneal = 0 where all tokens depend on one another and no few do (parity). Use a smaller balance where R
    is just enough and the states must be used unequally.
    """

    num_states: int = Field(default=8, ge=2, le=4096)
    expander_rank: int = Field(default=32, ge=0, le=1 << 16)
    noise: float = Field(default=0.5, gt=0)
    gamma: float = Field(default=0.9, gt=0, le=1)
    anneal: float = Field(default=0.5, ge=0, le=1)
    balance: float = Field(default=0.1, ge=0)


@dataclass(frozen=True)
class Factors:
    """The circuits of B blocks, in float64 nats: each normalised over its last axis."""

    root: Tensor  # (B, R)
    moves: Tensor  # (B, N, R, R): from one state to the next
    emissions: Tensor  # (B, K, R, V)


class Circuit(JointHead):
    """Shared by the three families. A family defines how its states depend: `num_moves`, `walk`, `states`, `steps`."""

    exact, conditional = True, True
    Config = CircuitConfig

    def __init__(self, config: CircuitConfig, length: int, vocab_size: int, width: int) -> None:
        super().__init__(config, length, vocab_size, width)
        R, r, N = config.num_states, config.expander_rank, self.num_moves
        self.expand_bias = nn.Parameter(torch.zeros(length, R, width))
        if r:
            self.expand_down = nn.Parameter(torch.zeros(length, R, width, r))
            self.expand_up = nn.Parameter(torch.zeros(length, R, r, width))
        else:
            self.expand = nn.Parameter(torch.zeros(length, R, width, width))
        self.root = nn.Linear(width, R)
        self.moves = nn.Linear(width, N * R * R) if N else None

    @torch.no_grad()
    def initialise(self, key: Key) -> None:
        """Expanders and biases normal, of size `noise` relative to h, keyed by name; uniform root; moves near the
        identity."""
        c: CircuitConfig = self.config
        for parameter in self.parameters():
            parameter.zero_()
        sizes = {"expand_bias": c.noise, "expand_down": 1.0, "expand_up": c.noise, "expand": c.noise}
        for name, size in sizes.items():
            parameter = getattr(self, name, None)
            if parameter is not None:
                fan_in = 1 if parameter is self.expand_bias else parameter.shape[-2]
                parameter.copy_(key.fold(name).normal(tuple(parameter.shape)) * size / math.sqrt(fan_in))
        if self.moves is not None:
            start = key.fold("moves").normal((self.num_moves, c.num_states, c.num_states))
            self.moves.bias.copy_((start + torch.eye(c.num_states)).flatten())

    # ---- the family -----------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def num_moves(self) -> int:
        """N."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Sequential samples before all tokens are sampled at once (`sample_latent`)."""

    @abstractmethod
    def walk(self, factors: Factors, num: int, visit: Visit) -> None:
        """Call `visit` for tokens 0 .. num - 1 in order, each given those before it."""

    @abstractmethod
    def states(self, factors: Factors, uniforms: Tensor) -> Tensor:
        """(B, K) int64: latent states, sampled with uniforms (B, K)."""

    # ---- the contract ---------------------------------------------------------------------------------------------

    def factors(self, call: JointCall) -> Factors:
        """The circuits after the contexts of a call: one pass of the expanders and of the unembedding."""
        h, R = call.start, self.config.num_states
        if self.config.expander_rank:
            low = torch.einsum("bw,krwi->bkri", h, self.expand_down.to(h.dtype))
            moved = torch.einsum("bkri,kriv->bkrv", low, self.expand_up.to(h.dtype))
        else:
            moved = torch.einsum("bw,krwv->bkrv", h, self.expand.to(h.dtype))
        expanded = h[:, None, None] + moved.to(h.dtype) + self.expand_bias.to(h.dtype)
        emissions = call.read(expanded).double().log_softmax(-1)
        root = _linear(self.root, h).double().log_softmax(-1)
        if self.moves is None:
            return Factors(root, root.new_zeros(len(h), 0, R, R), emissions)
        moves = _linear(self.moves, h).double().unflatten(-1, (self.num_moves, R, R)).log_softmax(-1)
        return Factors(root, moves, emissions)

    def score(self, factors: Factors, ids: Tensor, power: float = 1.0) -> tuple[Tensor, Tensor]:
        """ids (B, m) -> log q(x_k | x_<k) (B, m) and log P(z_k | x_<=k) (B, m, R).

        With emissions f to a `power` below one: with F_k = log E_z[(f_1 .. f_k)^power] / power, the differences
        F_k - F_(k-1). By Jensen F_k <= log q(x_<=k). Responsibilities are those of the softened emissions.
        """
        index = ids[:, :, None, None].expand(-1, -1, self.config.num_states, 1)
        scores = factors.emissions[:, : ids.shape[1]].gather(-1, index).squeeze(-1) * power
        found: list[Tensor] = []
        after: list[Tensor] = []

        def visit(k: int, belief: Tensor) -> Tensor:
            both = belief + scores[:, k]
            found.append(both.logsumexp(-1) / power)
            after.append(both.log_softmax(-1))
            return scores[:, k]

        self.walk(factors, ids.shape[1], visit)
        return torch.stack(found, 1), torch.stack(after, 1)

    def run(self, factors: Factors, num: int, choose: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Choose tokens left to right: ids (B, num) and log q(. | x_<k) (B, num, V). `choose` maps k and the
        log-probabilities (B, V) to ids (B,)."""
        ids: list[Tensor] = []
        found: list[Tensor] = []

        def visit(k: int, belief: Tensor) -> Tensor:
            log_p = (belief.unsqueeze(-1) + factors.emissions[:, k]).logsumexp(1)
            found.append(log_p)
            ids.append(choose(k, log_p))
            index = ids[-1][:, None, None].expand(-1, self.config.num_states, 1)
            return factors.emissions[:, k].gather(-1, index).squeeze(-1)

        self.walk(factors, num, visit)
        return torch.stack(ids, 1), torch.stack(found, 1)

    def sample(self, call: JointCall, uniforms: Tensor, key: Key, passes: int = 1) -> Draft:
        """Token k is the inverse-CDF sample of q(. | x_<k) at u_k. Fewer uniforms than K give the first tokens only."""
        num = self.num_tokens(uniforms)
        self.check_passes(passes, num)
        ids, log_q = self.run(self.factors(call), num, lambda k, log_p: inverse_cdf_sample(log_p, uniforms[:, k]))
        return Draft(ids, log_q, num)

    def sample_latent(self, call: JointCall, uniforms: Tensor, key: Key) -> Draft:
        """The same distribution in fewer sequential steps: states from the root down, sampled with `key`, then all
        tokens at once, token k at u_k. Its conditionals are those of `conditionals`; the draft has no `log_q`."""
        factors, num = self.factors(call), self.num_tokens(uniforms)
        draws = key.fold("states").uniform((len(uniforms), self.length), torch.float64)
        states = self.states(factors, draws.to(uniforms.device))[:, :num]
        index = states[:, :, None, None].expand(-1, -1, 1, self.vocab_size)
        return Draft(
            inverse_cdf_sample(factors.emissions[:, :num].gather(2, index).squeeze(2), uniforms), steps=self.steps
        )

    def log_prob(self, call: JointCall, ids: Tensor, key: Key) -> LogProb:
        """Of ids (B, m), m <= K: the exact marginal of a shorter block."""
        self.num_tokens(ids)
        return LogProb(self.score(self.factors(call), ids)[0].sum(-1), "exact")

    def conditionals(self, call: JointCall, ids: Tensor) -> Tensor:
        """(B, m, V): log q(. | x_<k) for ids (B, m)."""
        return self.run(self.factors(call), self.num_tokens(ids), lambda k, _: ids[:, k])[1]

    def loss(self, call: JointCall, inputs: LossInputs) -> dict[str, Terms]:
        """-sum_k gamma^(k-1) log q(x_k | x_<k) over the valid prefix, per unit of gamma^(k-1).

        During annealing the power of emissions rises from a half to one: states share every block before they divide
        the blocks among them (deterministic annealing; Ueda and Nakano 1998). The annealed value is an upper bound of
        the loss.
        """
        c: CircuitConfig = self.config
        ids, valid = inputs.blocks.ids, inputs.blocks.valid
        power = 1.0
        if inputs.progress < c.anneal:
            power = FIRST_POWER + (1 - FIRST_POWER) * inputs.progress / c.anneal
        found, after = self.score(self.factors(call), ids, power)
        weight = valid * c.gamma ** torch.arange(ids.shape[1], device=ids.device, dtype=torch.float64)
        dtype = torch.promote_types(call.start.dtype, torch.float32)
        terms = {"circuit": Terms(-(found * weight).sum().to(dtype), float(weight.sum()))}
        if c.balance:
            terms["balance"] = Terms(_imbalance(after, valid).to(dtype), inputs.blocks.count, c.balance)
        return terms


@JOINT_HEADS.register("cp")
class CP(Circuit):
    """q(x) = sum_r w_r prod_k f_kr(x_k)."""

    order = "any"

    @property
    def num_moves(self) -> int:
        return 0

    @property
    def steps(self) -> int:
        return 1

    def walk(self, factors: Factors, num: int, visit: Visit) -> None:
        belief = factors.root
        for k in range(num):
            belief = (belief + visit(k, belief)).log_softmax(-1)

    def states(self, factors: Factors, uniforms: Tensor) -> Tensor:
        return inverse_cdf_sample(factors.root, uniforms[:, 0]).unsqueeze(1).expand(-1, self.length)


@JOINT_HEADS.register("hmm")
class HMM(Circuit):
    """A chain of states z_1 .. z_K; transitions depend on the step and on the context."""

    @property
    def num_moves(self) -> int:
        return self.length - 1

    @property
    def steps(self) -> int:
        return self.length

    def walk(self, factors: Factors, num: int, visit: Visit) -> None:
        belief = factors.root
        for k in range(num):
            after = (belief + visit(k, belief)).log_softmax(-1)
            if k + 1 < num:
                belief = (after.unsqueeze(-1) + factors.moves[:, k]).logsumexp(1)

    def states(self, factors: Factors, uniforms: Tensor) -> Tensor:
        found = [inverse_cdf_sample(factors.root, uniforms[:, 0])]
        rows = torch.arange(len(uniforms), device=uniforms.device)
        for k in range(self.length - 1):
            found.append(inverse_cdf_sample(factors.moves[rows, k, found[-1]], uniforms[:, k + 1]))
        return torch.stack(found, 1)


Span = tuple[int, int]  # tokens start .. end - 1


@JOINT_HEADS.register("tree")
class Tree(Circuit):
    """Each span [a, b) of two or more tokens has a state. The root's is sampled from `root`; a half's is sampled given
    its parent's, by a matrix of the half, numbered level by level: trained matrices depend on the order. A token uses
    the state of the smallest such span around it."""

    order = "any"

    def __init__(self, config: CircuitConfig, length: int, vocab_size: int, width: int) -> None:
        super().__init__(config, length, vocab_size, width)
        self.levels = _levels(length)
        self.number = {span: n for n, span in enumerate(span for level in self.levels for span, _ in level)}

    @property
    def num_moves(self) -> int:
        return max(self.length - 2, 0)

    @property
    def steps(self) -> int:
        return 1 + len(self.levels)

    def walk(self, factors: Factors, num: int, visit: Visit) -> None:
        self._walk(factors, (0, self.length), factors.root, num, visit)

    def _walk(self, factors: Factors, span: Span, belief: Tensor, num: int, visit: Visit) -> Tensor:
        """belief (B, R): log P(state of span | x before it). Returns log P(x of span, up to token num | state)."""
        if span[1] - span[0] == 1:
            return visit(span[0], belief)
        found = torch.zeros_like(belief)
        for half in _halves(span):
            if half[0] >= num:
                break
            before = (belief + found).log_softmax(-1)
            if half not in self.number:
                found = found + visit(half[0], before)
                continue
            move = factors.moves[:, self.number[half]]
            inner = self._walk(factors, half, (before.unsqueeze(-1) + move).logsumexp(1), num, visit)
            found = found + (move + inner.unsqueeze(1)).logsumexp(-1)
        return found

    def states(self, factors: Factors, uniforms: Tensor) -> Tensor:
        state = {(0, self.length): inverse_cdf_sample(factors.root, uniforms[:, 0])}
        rows = torch.arange(len(uniforms), device=uniforms.device)[:, None]
        done = 0
        for level in self.levels:
            numbers = torch.arange(done, done + len(level), device=uniforms.device)
            parents = torch.stack([state[parent] for _, parent in level], 1)
            drawn = inverse_cdf_sample(
                factors.moves[rows, numbers, parents], uniforms[:, 1 + done : 1 + done + len(level)]
            )
            state |= {span: drawn[:, n] for n, (span, _) in enumerate(level)}
            done += len(level)
        smallest = [min((s for s in state if s[0] <= k < s[1]), key=lambda s: s[1] - s[0]) for k in range(self.length)]
        return torch.stack([state[span] for span in smallest], 1)


def _halves(span: Span) -> tuple[Span, Span]:
    """The left half is the longer one for an odd number."""
    middle = (span[0] + span[1] + 1) // 2
    return (span[0], middle), (middle, span[1])


def _levels(length: int) -> list[list[tuple[Span, Span]]]:
    """(span, parent) of every span of two or more tokens below the root, level by level."""
    levels: list[list[tuple[Span, Span]]] = []
    parents = [(0, length)]
    while parents:
        level = [(half, p) for p in parents if p[1] - p[0] > 1 for half in _halves(p) if half[1] - half[0] > 1]
        if level:
            levels.append(level)
        parents = [span for span, _ in level]
    return levels


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in x's dtype."""
    return nn.functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _imbalance(after: Tensor, valid: Tensor) -> Tensor:
    """Sum over valid tokens of log R - H(mean over blocks of P(z_k | x_<=k)), in nats: zero if all states are used
    equally."""
    count = valid.sum(0)
    mean = (after.exp() * valid.unsqueeze(-1)).sum(0) / count.clamp(min=1).unsqueeze(-1)
    entropy = -torch.special.xlogy(mean, mean).sum(-1)
    return ((math.log(after.shape[-1]) - entropy) * count).sum()
