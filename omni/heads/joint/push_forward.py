"""The push-forward head: a placeholder for every token, with the token's noise as its input. The default.

Autoregressive decoding is a map from noise to text: x_k is the inverse-CDF sample of P(. | c, x_<k) at eps_k, for
k = 1, 2, .... This head computes that map for K tokens at once (arXiv 2512.21323; the two outputs per placeholder are
ours). Placeholder j takes the place of x_j, sees the noise eps_1 .. eps_j, and has two outputs:

    decode       O_j: its own token x_j, a function of c and eps_<=j. The unembedding, after a matrix that starts as
                 the identity
    categorical  C_j: P(x_j+1 | c, eps_<=j), as the model computes it from a token's hidden state; C_0 is P(x_1 | c)

Sampling: ids from one pass in either mode. The first id equals that of autoregressive decoding; K passes are
autoregressive decoding. Categorical mode has the probabilities of its samples; its distribution over blocks has a
bound. noise_kinds has the kinds of noise.

Bound. In categorical mode x_k is the sample of C_k-1(. | eps_<k) at eps_k. With noise sampled left to right,
eps_k ~ p(. | C_k-1, x_k),

    q(x) = E prod_k C_k-1(x_k | eps_<k)

(the mean over that noise; substitute it in the integral over the prior). In expectation, the logarithm of one sample is
below log q, and log-mean-exp of M samples is a bound that tightens with M. It is an evidence bound whose posterior is
exact for every token, but does not depend on the tokens after it.

Loss. Noise for real data, by inversion, and fresh noise with the head's own targets:

    decode       cross-entropy of O_j to x_j: its optimum is zero
    categorical  cross-entropy of C_j to x_j+1: its optimum is the data's entropy
    semigroup    on a share of blocks: cross-entropy of O_j, given fresh noise, to the ids of two consecutive calls of
                 the target; zero where K tokens at once equal those of the two shorter calls

One pass with a graph computes all three: a block has either the noise of its data or fresh noise. The semigroup's calls
are cut after the first token or in the middle, by a keyed choice per batch. The first token of each call is that of
autoregressive decoding. Progressive distillation of such maps is in arXiv 2606.10820.

Legend: B blocks of tokens, K tokens, S numbers of a token's noise, V vocabulary, W width, M samples.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from omni.config import Frozen
from omni.heads.joint.base import JOINT_HEADS, Draft, ExtendedCall, JointCall, JointHead, LogProb, LossInputs
from omni.heads.joint.noise_kinds import SMALLEST, NoiseKind, build_noise, uniforms_by_name
from omni.heads.joint.product import each
from omni.objectives.terms import Terms
from omni.rng import Key

Mode = Literal["decode", "categorical"]


class PushForwardConfig(Frozen):
    """noise: see noise_kinds; `frequencies`: of the sines that embed it (not for Gumbel noise).

    mode: the output that drafts. first: the first token in decode mode: "pick", as in autoregressive decoding (the same
    pass has its probabilities), or by the decode output ("decode").
    intervals: the noise of data: within the probabilities of the autoregressive pass ("teacher"), or within the head's
    own categorical ones ("own": needs no correct teacher, but K - 1 more passes a step).
    categorical_target: cross-entropy to the ids, or to the teacher's probabilities (the same optimum, less variance).
    decode_weight, categorical_weight: of the two outputs; 0 removes one. decay: the j-th token has weight decay^(j -
    1).
    semigroup_share: of blocks with fresh noise, trained on the ids of two shorter calls; 0: none.
    num_samples: noise samples of a block's likelihood; the bound tightens as it grows.
    reads_start: a linear map of the hidden state before the block is added to every placeholder.
    """

    noise: NoiseKind = "uniform"
    frequencies: int = Field(default=8, ge=1, le=24)
    mode: Mode = "decode"
    first: Literal["pick", "decode"] = "pick"
    intervals: Literal["teacher", "own"] = "teacher"
    categorical_target: Literal["ids", "teacher"] = "ids"
    decode_weight: float = Field(default=1.0, ge=0)
    categorical_weight: float = Field(default=1.0, ge=0)
    semigroup_weight: float = Field(default=0.5, gt=0)
    semigroup_share: float = Field(default=0.25, ge=0, le=1)
    decay: float = Field(default=1.0, gt=0, le=1)
    num_samples: int = Field(default=16, ge=1)
    reads_start: bool = False

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> PushForwardConfig:
        given = self.model_fields_set
        if self.noise == "gumbel" and "frequencies" in given:
            raise ValueError("Gumbel noise has no sines: leave frequencies out")
        if self.mode == "categorical" and self.first == "decode":
            raise ValueError('first = "decode" has no effect with mode = "categorical": leave first out')
        if self.semigroup_share == 0 and "semigroup_weight" in given:
            raise ValueError("semigroup_weight has no effect where semigroup_share is 0: leave it out")
        if self.categorical_weight == 0 and "categorical_target" in given:
            raise ValueError("categorical_target has no effect where categorical_weight is 0: leave it out")
        if self.decode_weight == self.categorical_weight == self.semigroup_share == 0:
            raise ValueError("nothing is left to train: set decode_weight or categorical_weight above 0")
        return self


@JOINT_HEADS.register("push_forward")
class PushForward(JointHead):
    """The push-forward head of the module docstring. Names of weights are stored: never rename them."""

    layout, universal, needs_teacher, passes, is_recurrent = "causal", True, True, "divisors", True
    Config = PushForwardConfig
    config: PushForwardConfig

    def __init__(self, config: PushForwardConfig, length: int, vocab_size: int, width: int) -> None:
        super().__init__(config, length, vocab_size, width)
        self.placeholder = nn.Parameter(torch.zeros(width))
        self.noise = build_noise(config.noise, vocab_size, width, config.frequencies)
        self.decoder = nn.Parameter(torch.zeros(width, width))
        self.of_start = nn.Parameter(torch.zeros(width, width)) if config.reads_start else None
        self.inverts_noise = config.noise == "uniform"  # of all ids; other noise is of the ids that are drafted
        self.needs_teacher = config.intervals == "teacher" or config.categorical_target == "teacher"

    def initialise(self, key: Key) -> None:
        """The matrix before the decode output starts at zero; the embedding of Gumbel noise has deviation one."""
        super().initialise(key)
        torch.nn.init.zeros_(self.decoder)
        if self.of_start is not None:
            torch.nn.init.zeros_(self.of_start)
        if self.config.noise == "gumbel":
            weight = self.get_parameter("noise.weigh.weight")
            weight.data.copy_(key.fold("noise.weigh.weight").normal(tuple(weight.shape)))

    # ---- one pass -------------------------------------------------------------------------------------------------

    def placeholders(self, noise: Tensor, call: JointCall) -> Tensor:
        """Noise (B, n, S) -> inputs (B, n, W). The hidden state before the block is read where it is used alone: it
        may cost a pass."""
        inputs = self.placeholder + self.noise.embed(noise)
        if self.of_start is None:
            return inputs
        start = call.start
        return inputs + nn.functional.linear(start, self.of_start.to(start.dtype)).unsqueeze(1)

    def next_logits(self, call: JointCall, hidden: Tensor) -> Tensor:
        """Logits of the autoregressive pass, of the ids that the noise is about."""
        return call.read_all(hidden) if self.inverts_noise else call.read(hidden)

    def decode(self, call: JointCall, hidden: Tensor) -> Tensor:
        """Hidden states of placeholders (..., W) -> logits (..., V) of their tokens."""
        return call.read(hidden + nn.functional.linear(hidden, self.decoder.to(hidden.dtype)))

    def one_pass(self, call: JointCall, noise: Tensor, mode: Mode, first: str) -> tuple[Tensor, Tensor | None]:
        """Ids (B, n) for noise (B, n, S) from one pass; in categorical mode also their log-probabilities (B, n, V)
        float64."""
        n = noise.shape[1]
        needed = 0 if n == 1 and first == "pick" else n - (mode == "categorical")
        hidden = call(self.placeholders(noise[:, :needed], call)) if needed else call.start.unsqueeze(1)
        if mode == "categorical":
            log_probs = call.read(hidden).double().log_softmax(-1)
            return self.noise.choose(log_probs, noise), log_probs
        heads = [self.noise.choose(self.next_logits(call, hidden[:, :1]), noise[:, :1])] if first == "pick" else []
        rest = hidden[:, 1 + len(heads) :]
        return torch.cat([*heads, self.decode(call, rest).argmax(-1)], 1), None

    # ---- the contract ---------------------------------------------------------------------------------------------

    def sample(self, call: JointCall, uniforms: Tensor, key: Key, passes: int = 1) -> Draft:
        """See the contract. `passes` must divide K: each pass gives K / passes tokens; K passes are autoregressive
        decoding. The noise is `uniforms` itself, or partly keyed for other kinds (see Noise.prior)."""
        K = self.num_tokens(uniforms)
        self.check_passes(passes, K)
        noise = self.noise.prior(uniforms, key)
        return self.sample_in_passes(call, noise, [K // passes] * passes, self.config.mode, self.config.first)

    def sample_in_passes(self, call: JointCall, noise: Tensor, cuts: Sequence[int], mode: Mode, first: str) -> Draft:
        """Ids for noise (B, K, S). Each number n in `cuts` is one pass that gives the next n ids, after all ids before
        it."""
        ids, log_probs, at = noise.new_zeros(len(noise), 0, dtype=torch.int64), [], 0
        for n in cuts:
            behind = ExtendedCall(call, ids) if at else call
            found, log_p = self.one_pass(behind, noise[:, at : at + n], mode, first)
            ids, at = torch.cat([ids, found], 1), at + n
            log_probs += [] if log_p is None else [log_p]
        return Draft(ids, torch.cat(log_probs, 1) if log_probs else None)

    def draft_recurrently(self, call: JointCall, emitted: Tensor, uniforms: Tensor) -> Generator[Tensor, Tensor, None]:
        """One pass of the placeholders in the last layers. The first emitted id stands as noise of its own: the middle
        of its interval under the distribution before it. In decode mode an id is likely for its noise alone: all mass
        is on it."""
        num = min(self.num_after(emitted), uniforms.shape[1])
        if emitted.shape[1] != 1:
            raise ValueError(f"this head drafts after one id that no pass has read, not after {emitted.shape[1]}")
        middle = uniforms.new_full((*emitted.shape, self.noise.size), 0.5)
        before = self.next_logits(call, call.start).unsqueeze(1)
        known = self.noise.invert(before, emitted.clamp(max=before.shape[-1] - 1), middle)
        noise = torch.cat([known, self.noise.prior(uniforms[:, :num], Key(0))], 1)
        if self.config.mode == "categorical":
            return each(call.read(call(self.placeholders(noise[:, :num], call))[:, 1:]))
        logits = self.decode(call, call(self.placeholders(noise, call))[:, 2:])
        best = logits.argmax(-1, keepdim=True)
        return each(torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0))

    def loss(self, call: JointCall, inputs: LossInputs) -> dict[str, Terms]:
        return push_forward_terms(self, call, inputs)

    def log_prob(self, call: JointCall, ids: Tensor, key: Key) -> LogProb:
        """A lower bound, for categorical mode in one pass, whatever mode the head drafts in."""
        return LogProb(block_bound(self, call, ids, key, self.config.num_samples), "bound")


@torch.no_grad()
def own_noise(head: PushForward, call: JointCall, ids: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Noise (B, K, S) of ids (B, K) under the head's own categorical probabilities, from uniforms `draws` (B, K, S);
    and the ids' log-probabilities (B, K). K - 1 passes; no graph."""
    K = ids.shape[1]
    hidden, found, scores = call.start, [], []
    for j in range(K):
        log_p = call.read(hidden).double().log_softmax(-1)
        scores.append(log_p.gather(-1, ids[:, j : j + 1]))
        found.append(head.noise.invert(log_p, ids[:, j], draws[:, j]))
        if j + 1 < K:
            hidden = call(head.placeholders(torch.stack(found, 1), call))[:, -1]
    return torch.stack(found, 1), torch.cat(scores, 1)


@torch.no_grad()
def block_bound(head: PushForward, call: JointCall, ids: Tensor, key: Key, num_samples: int) -> Tensor:
    """(B,) float64: log-mean-exp over `num_samples` noise samples; in expectation below log q(ids). num_samples times K
    - 1 passes."""
    total = torch.full((len(ids),), -math.inf, dtype=torch.float64, device=ids.device)
    for m in range(num_samples):
        shape = (*ids.shape, head.noise.size)
        draws = key.fold("posterior", m).uniform(shape, torch.float64).to(ids.device)
        total = torch.logaddexp(total, own_noise(head, call, ids, draws)[1].sum(-1))
    return total - math.log(num_samples)


@dataclass(frozen=True)
class Targets:
    """Inputs and targets of the pass with a graph: noise (B, K, S) and target ids (B, K). `counted` (B, K): the
    positions that count. `fresh` (B,): blocks whose targets come from shorter calls."""

    noise: Tensor
    ids: Tensor
    counted: Tensor
    fresh: Tensor


def push_forward_terms(head: PushForward, call: JointCall, inputs: LossInputs) -> dict[str, Terms]:
    """Terms "decode", "categorical" (where K > 1) and "semigroup", those whose weight is not zero."""
    return terms_of(head, call, build_targets(head, call, inputs), inputs.teacher)


@torch.no_grad()
def build_targets(head: PushForward, call: JointCall, inputs: LossInputs) -> Targets:
    """The noise of the data; on the semigroup's share of blocks, fresh noise with its targets. Keyed by block names. A
    token of (nearly) zero probability has no noise: it and those after it do not count."""
    blocks, share = inputs.blocks, head.config.semigroup_share
    device, shape = blocks.ids.device, (blocks.ids.shape[1], head.noise.size)
    draws = uniforms_by_name(blocks.names, shape, inputs.key.fold("noise")).to(device)
    if head.config.intervals == "own":
        noise, scores = own_noise(head, call, blocks.ids, draws)
    else:
        noise = head.noise.invert(inputs.teacher, blocks.ids, draws)
        scores = inputs.teacher.gather(-1, blocks.ids.unsqueeze(-1)).squeeze(-1)
    counted = blocks.valid & (scores > math.log(SMALLEST)).long().cumprod(-1).bool()
    fresh = torch.zeros(len(counted), dtype=torch.bool, device=device)
    if share == 0:
        return Targets(noise, blocks.ids, counted, fresh)
    fresh = uniforms_by_name(blocks.names, (), inputs.key.fold("share")).to(device) < share
    free = head.noise.form(uniforms_by_name(blocks.names, shape, inputs.key.fold("fresh")).to(device))
    targets = semigroup_targets(head, call, free, inputs)
    mine = fresh.unsqueeze(-1)
    noise = torch.where(mine.unsqueeze(-1), free, noise)
    return Targets(noise, torch.where(mine, targets, blocks.ids), torch.where(mine, blocks.valid, counted), fresh)


@torch.no_grad()
def semigroup_targets(head: PushForward, call: JointCall, noise: Tensor, inputs: LossInputs) -> Tensor:
    """Ids (B, K) from two calls of the target for noise (B, K, S), cut by a keyed choice per batch."""
    K = noise.shape[1]
    newest = max(inputs.blocks.names)  # the key of the inputs is that of the run, without the step
    cut = K // 2 if inputs.key.fold("cut", *newest).python().random() < 0.5 else 1
    cuts = [cut, K - cut] if 0 < cut < K else [K]
    return head.sample_in_passes(call.target(), noise, cuts, "decode", "pick").ids


def terms_of(head: PushForward, call: JointCall, targets: Targets, teacher: Tensor) -> dict[str, Terms]:
    """The terms of `targets`, from one pass with a graph. Not random."""
    config, K = head.config, targets.ids.shape[1]
    hidden = call(head.placeholders(targets.noise, call))[:, 1:]
    decay = config.decay ** torch.arange(K, device=hidden.device)
    of_data, of_fresh = targets.counted & ~targets.fresh.unsqueeze(-1), targets.counted & targets.fresh.unsqueeze(-1)
    terms = {}
    if config.decode_weight or config.semigroup_share:
        miss = _cross_entropy(head.decode(call, hidden), targets.ids) * decay
        if config.decode_weight:
            terms["decode"] = _term(miss, of_data, config.decode_weight)
        if config.semigroup_share:
            terms["semigroup"] = _term(miss, of_fresh, config.semigroup_weight)
    if config.categorical_weight and K > 1:
        logits = call.read(hidden[:, :-1])
        if config.categorical_target == "teacher":
            log_c = _in_float32(logits).log_softmax(-1)
            miss = -(teacher[:, 1:, : log_c.shape[-1]].exp().to(log_c.dtype) * log_c).sum(-1)
        else:
            miss = _cross_entropy(logits, targets.ids[:, 1:])
        terms["categorical"] = _term(miss * decay[1:], of_data[:, 1:], config.categorical_weight)
    return terms


def _cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """(B, n) of logits (B, n, V)."""
    return cross_entropy(_in_float32(logits).flatten(0, 1), ids.flatten(), reduction="none").unflatten(0, ids.shape)


def _in_float32(logits: Tensor) -> Tensor:
    """In float32, or better if they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _term(miss: Tensor, where: Tensor, weight: float) -> Terms:
    """The sum of `miss` (B, n) where `where` (B, n) is true, and their number."""
    return Terms((miss * where).sum(), float(where.sum()), weight)
