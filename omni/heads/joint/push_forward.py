"""The push-forward head: a placeholder for every token, each told the noise its token is to be drawn with. The default.

Plain decoding is a map from noise to text, x_k = pick(P(. | c, x_<k), eps_k) for k = 1, 2, ..., and this head is that
map for K tokens at once (arXiv 2512.21323; the placeholder's two read-outs at once are ours). Placeholder j stands
where x_j will stand, sees the noise eps_1 .. eps_j, and is read twice:

    decode       O_j: its own token x_j, a function of c and eps_<=j. The unembedding, after a matrix that starts as
                 the identity
    categorical  C_j: P(x_j+1 | c, eps_<=j), as the model reads a token's hidden state; C_0 is P(x_1 | c) itself

What the head draws: ids from one pass in either mode, the first of them exactly as plain decoding does; K passes are
plain decoding. Categorical mode knows the laws it draws from; of its law over blocks there is a bound
(push_forward_bound). The loss is in push_forward_loss, the kinds of noise in noise_kinds.

Legend: B blocks, K tokens, S numbers of a token's noise, V vocabulary, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from omni.config import Frozen
from omni.heads.joint.base import JOINT_HEADS, After, Draft, JointCall, JointHead, Lesson, LogProb
from omni.heads.joint.noise_kinds import NoiseKind, build_noise
from omni.heads.joint.push_forward_bound import block_bound
from omni.heads.joint.push_forward_loss import push_forward_terms
from omni.rng import Key
from omni.terms import Terms

Mode = Literal["decode", "categorical"]


class PushForwardConfig(Frozen):
    """noise: see noise_kinds; `frequencies`: of the sines that show it to a placeholder (Gumbel noise has none).

    mode: the read-out that drafts. first: how decode mode says the first token, "pick" as plain decoding does (its law
    is in the same pass) or by its own read-out ("decode").
    intervals: the noise that data stands for: within the autoregressive pass's laws ("teacher"), or within the head's
    own categorical laws ("own": no teacher is needed to be right, but K - 1 more passes a step).
    categorical_target: cross-entropy to the ids, or to the teacher's laws (the same optimum, less variance).
    decode_weight, categorical_weight: of the two read-outs; 0 leaves one out. decay: of the j-th token, decay^(j - 1).
    semigroup_share: of blocks that are given fresh noise and told what two shorter calls make of it; 0: none.
    num_samples: of noise for a block's likelihood; the bound tightens as it grows.
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

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> PushForwardConfig:
        given = self.model_fields_set
        if self.noise == "gumbel" and "frequencies" in given:
            raise ValueError("gumbel noise is not shown by sines: leave frequencies out")
        if self.mode == "categorical" and self.first == "decode":
            raise ValueError('mode "categorical" draws its first token as plain decoding does: leave first at "pick"')
        if self.semigroup_share == 0 and "semigroup_weight" in given:
            raise ValueError("semigroup_weight has no effect where semigroup_share is 0: leave it out")
        if self.categorical_weight == 0 and "categorical_target" in given:
            raise ValueError("categorical_target has no effect where categorical_weight is 0: leave it out")
        if self.decode_weight == self.categorical_weight == self.semigroup_share == 0:
            raise ValueError("nothing is left to train: set decode_weight or categorical_weight above 0")
        return self


@JOINT_HEADS.register("push_forward")
class PushForward(JointHead):
    layout, universal, needs_teacher, passes = "causal", True, True, "divisors"
    Config = PushForwardConfig
    config: PushForwardConfig

    def __init__(self, config: PushForwardConfig, length: int, vocab_size: int, width: int) -> None:
        super().__init__(config, length, vocab_size, width)
        self.placeholder = nn.Parameter(torch.zeros(width))
        self.noise = build_noise(config.noise, vocab_size, width, config.frequencies)
        self.decoder = nn.Parameter(torch.zeros(width, width))
        self.needs_teacher = config.intervals == "teacher" or config.categorical_target == "teacher"

    def initialise(self, key: Key) -> None:
        """The matrix before the decode read-out at zero, what shows Gumbel noise as an embedding of deviation one."""
        super().initialise(key)
        torch.nn.init.zeros_(self.decoder)
        if self.config.noise == "gumbel":
            weight = self.get_parameter("noise.weigh.weight")
            weight.data.copy_(key.fold("noise.weigh.weight").normal(tuple(weight.shape)))

    # ---- one pass -------------------------------------------------------------------------------------------------

    def placeholders(self, noise: Tensor) -> Tensor:
        """Noise (B, n, S) -> inputs (B, n, W)."""
        return self.placeholder + self.noise.embed(noise)

    def decode(self, call: JointCall, hidden: Tensor) -> Tensor:
        """Hidden states of placeholders (..., W) -> logits (..., V) of the tokens they stand for."""
        return call.read(hidden + nn.functional.linear(hidden, self.decoder.to(hidden.dtype)))

    def one_pass(self, call: JointCall, noise: Tensor, mode: Mode, first: str) -> tuple[Tensor, Tensor | None]:
        """Ids (B, n) for noise (B, n, S) from one pass, and in categorical mode their laws (B, n, V) float64."""
        n = noise.shape[1]
        needed = 0 if n == 1 and first == "pick" else n - (mode == "categorical")
        hidden = call(self.placeholders(noise[:, :needed])) if needed else call.start.unsqueeze(1)
        if mode == "categorical":
            laws = call.read(hidden).double().log_softmax(-1)
            return self.noise.pick(laws, noise), laws
        heads = [self.noise.pick(call.read(hidden[:, :1]), noise[:, :1])] if first == "pick" else []
        rest = hidden[:, 1 + len(heads) :]
        return torch.cat([*heads, self.decode(call, rest).argmax(-1)], 1), None

    # ---- the contract ---------------------------------------------------------------------------------------------

    def sample(self, call: JointCall, uniforms: Tensor, key: Key, passes: int = 1) -> Draft:
        """See the contract. `passes` must divide K: that many calls of K / passes tokens; K of them are plain decoding.
        The noise is `uniforms` itself, or keyed where the kind is richer (see Noise.prior)."""
        K = self.fits(uniforms)
        self.check_passes(passes, K)
        noise = self.noise.prior(uniforms, key)
        return self.compose(call, noise, [K // passes] * passes, self.config.mode, self.config.first)

    def compose(self, call: JointCall, noise: Tensor, cuts: Sequence[int], mode: Mode, first: str) -> Draft:
        """Ids for noise (B, K, S) by one pass for every number in `cuts`, each after the ids of those before it."""
        ids, laws, at = noise.new_zeros(len(noise), 0, dtype=torch.int64), [], 0
        for n in cuts:
            behind = After(call, ids) if at else call
            found, law = self.one_pass(behind, noise[:, at : at + n], mode, first)
            ids, at = torch.cat([ids, found], 1), at + n
            laws += [] if law is None else [law]
        return Draft(ids, torch.cat(laws, 1) if laws else None)

    def loss(self, call: JointCall, lesson: Lesson) -> dict[str, Terms]:
        return push_forward_terms(self, call, lesson)

    def log_prob(self, call: JointCall, ids: Tensor, key: Key) -> LogProb:
        """A lower bound, of categorical mode's law in one pass, whatever mode the head drafts in."""
        return LogProb(block_bound(self, call, ids, key, self.config.num_samples), "bound")
