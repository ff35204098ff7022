"""The masked-block head: K placeholders that see one another. Some show a token; the head predicts the others.

    q_k(. | c, x_S)     for every k outside of the shown set S, from one pass

(absorbing diffusion inside a block: MDLM, arXiv 2406.07524, MD4, arXiv 2406.04329; with clean text before the block,
BD3-LM, arXiv 2503.09573). The input of a shown token is its embedding plus a learned vector; that of a masked token is
another vector; nothing is cached. Tokens revealed in one pass are independent. So one pass (S empty) is a product; N
passes cost at best the total correlation of every set given those before it; and only K passes represent any joint: the
head is not universal. masked_sampling chooses the tokens that a pass reveals.

Training. The evidence bound of absorbing diffusion is the same for every schedule: with m masked tokens of n,

    -log q(x) <= sum over m = 1 .. n of (1 / m) E_M sum over k in M of -log q_k(x_k | x without M),    |M| = m uniform

equal to the mean over all orders of revealing tokens one by one. A step samples one m per block, from the schedule's
distribution P, and weights its masked tokens by 1 / (m P(m)). Given the diffusion time, m is binomial; averaging over
that time reduces the variance. A block that ends after n < K tokens masks some of those n: placeholders past its end
stay masked and do not count, as do those past a shorter draft. There a mask means unknown, not that the text ends.

Legend: B blocks of tokens, K tokens, n <= K of them, V vocabulary, W width.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from functools import cache, partial
from itertools import combinations
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from omni.heads.joint.base import JOINT_HEADS, Draft, JointCall, JointHead, LogProb, LossInputs
from omni.heads.joint.losses import Target, token_losses
from omni.heads.joint.masked_sampling import Schedule, Unmasking, draw_in_passes
from omni.heads.joint.noise_kinds import uniforms_by_name
from omni.heads.joint.product import each
from omni.objectives.terms import Terms
from omni.rng import Key
from omni.samplers.inverse_cdf import inverse_cdf_sample
from omni.sequence.placeholders import Blocks


class MaskedConfig(Unmasking):
    """schedule: of training too. num_samples: the number of sets, for each number m of masked tokens, of a
    likelihood.

    trains: "sets": the evidence bound, over sets of masked tokens. "drafts": the first token is shown and all others
    are masked, as in recurrent drafting; the j-th masked token has weight decay^(j - 1) (DFlash). target: of "drafts",
    see `losses.token_losses`. reads_start: a linear map of the hidden state before the block is added to every input.
    """

    num_samples: int = Field(default=32, ge=1)
    trains: Literal["sets", "drafts"] = "sets"
    target: Target = "ids"
    decay: float = Field(default=1.0, gt=0, le=1)
    reads_start: bool = False

    @model_validator(mode="after")
    def _drafts_only(self) -> MaskedConfig:
        for option in ("target", "decay"):
            if option in self.model_fields_set and self.trains == "sets":
                raise ValueError(f'{option} has no effect unless trains is "drafts": leave it out')
        return self


@JOINT_HEADS.register("masked")
class Masked(JointHead):
    """The masked-block head of the module docstring. mask: the input of a masked token; shown: is added to the
    embedding of a shown one. Names of weights are stored: never rename them."""

    layout, conditional, passes, order = "block", True, "tokens", "any"
    Config = MaskedConfig
    config: MaskedConfig

    def __init__(self, config: MaskedConfig, length: int, vocab_size: int, width: int) -> None:
        super().__init__(config, length, vocab_size, width)
        self.mask = nn.Parameter(torch.zeros(width))
        self.shown = nn.Parameter(torch.zeros(width))
        self.decoder = nn.Parameter(torch.zeros(width, width))
        self.of_start = nn.Parameter(torch.zeros(width, width)) if config.reads_start else None
        self.is_recurrent = config.trains == "drafts"
        self.needs_teacher = config.target == "teacher"

    def initialise(self, key: Key) -> None:
        """The matrix before the output projection starts at zero. The mask is an embedding of deviation one: a whole
        block may be masks, and norms are steep at zero."""
        super().initialise(key)
        nn.init.zeros_(self.decoder)
        if self.of_start is not None:
            nn.init.zeros_(self.of_start)
        self.mask.data.copy_(key.fold("mask").normal((self.width,)))

    def logits(self, call: JointCall, ids: Tensor, shown: Tensor) -> Tensor:
        """(B, n, V) of every token, given those of ids (B, n) where `shown` (B, n). One pass, with K placeholders."""
        rest = self.length - ids.shape[1]
        ids, known = nn.functional.pad(ids, (0, rest)), nn.functional.pad(shown, (0, rest))
        tokens = call.embed(torch.where(known, ids, 0))
        inputs = torch.where(known.unsqueeze(-1), tokens + self.shown.to(tokens.dtype), self.mask.to(tokens.dtype))
        if self.of_start is not None:
            inputs = inputs + nn.functional.linear(call.start, self.of_start.to(call.start.dtype)).unsqueeze(1)
        hidden = call(inputs, causal=False)[:, 1 : 1 + shown.shape[1]]
        return call.read(hidden + nn.functional.linear(hidden, self.decoder.to(hidden.dtype)))

    def log_probs(self, call: JointCall, ids: Tensor, shown: Tensor) -> Tensor:
        """(B, n, V) float64 log q_k(. | c, x_S), S where `shown` (B, n). One pass."""
        return self.logits(call, ids, shown).double().log_softmax(-1)

    # ---- the contract ---------------------------------------------------------------------------------------------

    def draft_recurrently(self, call: JointCall, emitted: Tensor, uniforms: Tensor) -> Generator[Tensor, Tensor, None]:
        """One pass of the placeholders in the last layers, with the emitted ids shown."""
        m, num = emitted.shape[1], min(self.num_after(emitted), uniforms.shape[1])
        ids = nn.functional.pad(emitted, (0, num))
        return each(self.logits(call, ids, (torch.arange(m + num, device=ids.device) < m).expand_as(ids))[:, m:])

    def sample(self, call: JointCall, uniforms: Tensor, key: Key, passes: int = 1) -> Draft:
        """See the contract. 1 to n passes; token k is the inverse-CDF sample at u_k in the pass that reveals it. One
        pass gives exact `log_q`; with more, left-to-right probabilities do not exist and `log_q` is None. `key` orders
        the tokens."""
        num = self.num_tokens(uniforms)
        self.check_passes(passes, num)
        if passes == 1:
            log_probs = self.conditionals(call, torch.zeros_like(uniforms, dtype=torch.int64))
            return Draft(inverse_cdf_sample(log_probs, uniforms), log_probs)
        return Draft(draw_in_passes(partial(self.log_probs, call), uniforms, key, passes, self.config))

    def conditionals(self, call: JointCall, ids: Tensor) -> Tensor:
        """Of one pass; they depend on no token."""
        self.num_tokens(ids)
        return self.log_probs(call, ids, torch.zeros_like(ids, dtype=torch.bool))

    @torch.no_grad()
    def log_prob(self, call: JointCall, ids: Tensor, key: Key) -> LogProb:
        """The evidence bound of ids (B, n): in expectation over `key`, below the log-probability of revealing them one
        by one in a random order (n passes, "ancestral"). Not of the one-pass distribution; `conditionals` has its exact
        value.

        Every number m of masked tokens is enumerated. For each m, all sets are used if there are at most num_samples of
        them (32 by default: all for n <= 6), which makes the bound exact; else num_samples keyed sets. One pass per
        set.
        """
        num, total = self.num_tokens(ids), torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
        for m in range(1, num + 1):
            scores = []
            for masked in sets_of(len(ids), num, m, self.config.num_samples, key):
                masked = masked.to(ids.device)
                log_probs = self.log_probs(call, ids, ~masked)
                found = log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
                scores.append(torch.where(masked, found, 0.0).sum(-1) / m)
            total += torch.stack(scores).mean(0)
        return LogProb(total, "bound")

    def loss(self, call: JointCall, inputs: LossInputs) -> dict[str, Terms]:
        """The evidence bound of the valid prefix, in nats per token, with one set of masked tokens a block; or of
        drafts after the first token."""
        if self.config.trains == "drafts":
            return self.draft_loss(call, inputs)
        blocks = inputs.blocks
        masked, weights = draw_masks(blocks, self.config.schedule, inputs.key)
        logits = self.logits(call, blocks.ids, blocks.valid & ~masked)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        miss = nn.functional.cross_entropy(logits.flatten(0, 1), blocks.ids.flatten(), reduction="none")
        miss = torch.where(masked, miss.view_as(blocks.ids), 0.0)
        return {"masked": Terms((miss.sum(-1) * weights.to(miss.dtype)).sum(), blocks.count)}

    def draft_loss(self, call: JointCall, inputs: LossInputs) -> dict[str, Terms]:
        """Weighted cross-entropy of the tokens after the first, in nats per token."""
        blocks, number = inputs.blocks, torch.arange(self.length, device=inputs.blocks.ids.device)
        logits = self.logits(call, blocks.ids, blocks.valid & (number < 1))
        weight = blocks.valid * (number >= 1) * self.config.decay ** (number - 1)
        miss = token_losses(logits, inputs, self.config.target)
        return {"masked": Terms((miss * weight).sum(), float(weight.sum()))}


# ---- which tokens are masked ---------------------------------------------------------------------------------------


@cache
def mask_count_probs(num: int, schedule: Schedule) -> Tensor:
    """(num,) float64: P(m) for m = 1 .. num masked tokens. At a time u ~ U[0, 1] each is masked with probability u
    ("linear") or cos(pi u / 2) ("cosine"); the binomial is averaged over u, without the case of no masked token."""
    if schedule == "linear":
        return torch.full((num,), 1 / num, dtype=torch.float64)
    share = torch.cos((torch.arange(1024, dtype=torch.float64) + 0.5) / 1024 * (math.pi / 2)).unsqueeze(-1)
    m = torch.arange(1, num + 1, dtype=torch.float64)
    choose = torch.tensor([math.comb(num, int(k)) for k in m], dtype=torch.float64)
    mass = (choose * share**m * (1 - share) ** (num - m)).sum(0)
    return mass / mass.sum()


def draw_masks(blocks: Blocks, schedule: Schedule, key: Key) -> tuple[Tensor, Tensor]:
    """Masked tokens (B, K) bool, among the valid ones, and weights (B,) float64; the weighted sums over masked tokens
    are the evidence bound. The random values of a block depend on its name alone. A block without valid tokens has
    weight 0."""
    valid = blocks.valid.cpu()
    K, lengths = valid.shape[1], valid.sum(-1)
    probs = torch.stack([nn.functional.pad(mask_count_probs(n, schedule), (0, K - n)) for n in range(1, K + 1)])
    probs = probs[(lengths - 1).clamp(min=0)]
    u = spread_uniforms(blocks.names, key.fold("number"))
    number = (probs.cumsum(-1) <= u.unsqueeze(-1)).sum(-1) + 1
    number = torch.minimum(number, lengths)
    chosen = probs.gather(-1, (number - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    weights = torch.where(lengths > 0, 1 / (number.clamp(min=1) * chosen), 0.0)
    draws = uniforms_by_name(blocks.names, (K,), key.fold("set")).masked_fill(~valid, 2.0)
    masked = valid & (draws.argsort(-1).argsort(-1) < number.unsqueeze(-1))
    return masked.to(blocks.ids.device), weights.to(blocks.ids.device)


# One for each part of a name; another number changes the masks of every run.
NAME_MULTIPLIERS = (
    0x9E3779B97F4A7C15,
    0x6A09E667F3BCC909,
    0x93CD3A2C8198E269,
)  # 2^64 times irrational numbers, and odd


def spread_uniforms(names: tuple[tuple[int, int, int], ...], key: Key) -> Tensor:
    """(B,) float64: uniform on [0, 1) over keys, and evenly spread over the names of a step: one keyed number for the
    step plus a multiple of the golden section per name, modulo 1. Consecutively numbered documents are stratified; any
    others are no worse than independent. Each value depends on its own name alone."""
    start = key.integer() << 1
    turns = [start + sum(s * part for s, part in zip(NAME_MULTIPLIERS, name, strict=True)) for name in names]
    return torch.tensor([((turn % 2**64) >> 11) / 2**53 for turn in turns], dtype=torch.float64)


def sets_of(rows: int, num: int, m: int, most: int, key: Key) -> Iterator[Tensor]:
    """Sets (rows, num) bool of m masked tokens: all sets, the same for every row, or `most` keyed ones."""
    if math.comb(num, m) <= most:
        for chosen in combinations(range(num), m):
            yield torch.zeros(rows, num, dtype=torch.bool).index_fill_(1, torch.tensor(chosen), True)
    else:
        for n in range(most):
            draws = key.fold("set", m, n).uniform((rows, num), torch.float64)
            yield draws.argsort(-1).argsort(-1) < m
