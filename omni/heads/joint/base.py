"""The contract of joint-token heads: K tokens from one pass of the backbone, from a joint distribution.

A head's only access to the model is a `JointCall`. Its layout is the form of a pass:

    none     no placeholders: the head reads the hidden state of the block's start only
    causal   K placeholders, each seeing those before it
    block    K placeholders that see one another

From that pass it samples K ids. If its family allows, it also computes their exact (or bounded) log-probability, and
the conditionals q(x_k | x_<k) that rejection verification needs. Noise is uniforms (B, K), one per token. Where
possible, token k is the inverse-CDF sample of q_k at u_k (see samplers.inverse_cdf), and autoregressive decoding uses
the same u_k for p_k. Verification by common noise then accepts often (see samplers.verification).

A head may draft the first V ids of a larger vocabulary alone (JointConfig.vocabulary): then V is their number.

Legend: B blocks of tokens, K tokens of a block, V vocabulary, W width, n positions of a pass.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from omni.config import Frozen, build
from omni.nn.declare import declarations, fill
from omni.objectives.terms import Terms
from omni.registry import Registry
from omni.rng import Key
from omni.sequence.placeholders import Blocks

JOINT_HEADS: Registry = Registry("joint-token head", "omni.heads.joint", entry_points="omni.joint_heads")


class JointCall(Protocol):
    """The backbone after B contexts. `passes` counts its passes by this call and by calls derived from it."""

    @property
    def passes(self) -> int: ...

    @property
    def start(self) -> Tensor:
        """(B, W): the hidden state after the context; `read` of it gives the first token's logits."""
        ...

    def __call__(self, inputs: Tensor, causal: bool = True, clean: int = 0) -> Tensor:
        """One pass over n positions after the context: inputs (B, n, W) -> hidden (B, 1 + n, W), `start` first.

        The first `clean` inputs are embedded ids, with the visibility of text; the others are placeholders.
        """
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """(..., W): the embeddings of ids in the context stream."""
        ...

    def read(self, hidden: Tensor) -> Tensor:
        """(..., V): next-token logits of hidden states, of the ids that the head drafts."""
        ...

    def read_all(self, hidden: Tensor) -> Tensor:
        """Next-token logits of all ids."""
        ...

    def target(self) -> JointCall:
        """The same call, of the same weights, without a graph."""
        ...


class ExtendedCall:
    """A call whose context continues with clean ids (B, m). They are not cached: each pass includes them."""

    def __init__(self, call: JointCall, ids: Tensor) -> None:
        self.call, self.ids = call, ids
        self._start: Tensor | None = None

    @property
    def passes(self) -> int:
        return self.call.passes

    @property
    def start(self) -> Tensor:
        """(B, W): the hidden state after the clean ids; computed once, in one pass."""
        if self._start is None:
            m = self.ids.shape[1]
            self._start = self.call(self.call.embed(self.ids), clean=m)[:, m]
        return self._start

    def __call__(self, inputs: Tensor, causal: bool = True, clean: int = 0) -> Tensor:
        m = self.ids.shape[1]
        return self.call(torch.cat([self.call.embed(self.ids).to(inputs.dtype), inputs], 1), causal, m + clean)[:, m:]

    def embed(self, ids: Tensor) -> Tensor:
        return self.call.embed(ids)

    def read(self, hidden: Tensor) -> Tensor:
        return self.call.read(hidden)

    def read_all(self, hidden: Tensor) -> Tensor:
        return self.call.read_all(hidden)

    def target(self) -> JointCall:
        return ExtendedCall(self.call.target(), self.ids)


@dataclass(frozen=True)
class Draft:
    """n ids of every block. `log_q` (B, n, V): the log-probabilities that each id was sampled from, given the ids
    before it and noise that is independent of verification's; None if the head has none. `steps`: sequential steps of
    the head itself (samples or small networks)."""

    ids: Tensor  # (B, n) int64
    log_q: Tensor | None = None
    steps: int = 1


@dataclass(frozen=True)
class LogProb:
    """(B,) log-probability of whole blocks in nats, under the one-pass distribution unless the head documents another.
    kind "bound": a lower bound."""

    value: Tensor
    kind: Literal["exact", "bound"]


@dataclass(frozen=True)
class LossInputs:
    """Inputs of a loss besides the call. `teacher` (B, K, V): log P(. | c, x_<k) of the model's own
    autoregressive pass, without a graph: of the ids that the head drafts, float32 or better; if it `inverts_noise`,
    float64, with the others together as one more id. `key`: of
    the run, without the step, so random values must be keyed by block names. `progress`: the completed share of
    training."""

    blocks: Blocks
    teacher: Tensor
    key: Key
    progress: float = 1.0


class JointHead(nn.Module, ABC):
    """A head of K = `length` tokens over V ids, on a backbone of width W. Its options are a frozen config of its own.

    layout: see the module docstring. exact: `log_prob` is exact. universal: can represent any joint distribution, given
    capacity.
    needs_teacher: `loss` reads LossInputs.teacher. inverts_noise: it samples the noise of
    autoregressive decoding from them. order: whether positions depend left to right or in any order.
    passes: the number of passes in which `sample` can draft n tokens: one, a divisor of n, up to n, or any number.
    conditional: `conditionals` gives q(x_k | x_<k) of the one-pass distribution; rejection and block verification need
    it.
    is_recurrent: recurrent drafting: `draft_recurrently` drafts from a hidden state of text and the ids since, without
    a pass over text: by the head alone, or by placeholders in the last layers (JointConfig.depth).
    Names of weights are keys of checkpoints and of initial values: never rename them.
    """

    layout: ClassVar[Literal["none", "causal", "block"]] = "none"
    exact: ClassVar[bool] = False
    universal: ClassVar[bool] = False
    needs_teacher: bool = False
    inverts_noise: bool = False
    conditional: ClassVar[bool] = False
    is_recurrent: bool = False
    passes: ClassVar[Literal["one", "divisors", "tokens", "any"]] = "one"
    order: ClassVar[Literal["left_to_right", "any"]] = "left_to_right"
    Config: ClassVar[type[Frozen]] = Frozen

    def __init__(self, config: Any, length: int, vocab_size: int, width: int) -> None:
        super().__init__()
        self.config, self.length, self.vocab_size, self.width = config, length, vocab_size, width

    @torch.no_grad()
    def initialise(self, key: Key) -> None:
        """Weights keyed by name: constants as a module declares (nn.declare), other matrices normal with deviation
        1/sqrt(fan in) and vectors zero. Heads whose weights start otherwise (at zero, at the identity) override it."""
        declared = declarations(self)
        for name, parameter in self.named_parameters():
            if name in declared and declared[name].start == "constant":
                fill(parameter, declared[name], key, name)
            elif parameter.ndim < 2:
                parameter.zero_()
            else:
                draws = key.fold(name).normal(tuple(parameter.shape))
                parameter.copy_(draws / math.sqrt(parameter.shape[-1]))

    @abstractmethod
    def sample(self, call: JointCall, uniforms: Tensor, key: Key, passes: int = 1) -> Draft:
        """n ids per block from `passes` passes (one, unless the head refines). uniforms (B, n) float64 in [0, 1), n <=
        K: the noise of the tokens. `key`: all other random values. B is the number of blocks of the call."""

    def draft_recurrently(self, call: JointCall, emitted: Tensor, uniforms: Tensor) -> Generator[Tensor, Tensor, None]:
        """Recurrent drafting: yields logits (B, V) of one id after another, at most K - m, after ids `emitted` (B, m)
        that follow call.start and that no pass has read; receives the chosen ids (B,). For heads with `is_recurrent`.
        uniforms (B, n), n <= K - m, at least as many as ids are asked for: the noise of the ids to draft."""
        raise NotImplementedError(f"{type(self).__name__} has no recurrent drafting; it needs a pass of the backbone")

    def num_after(self, emitted: Tensor) -> int:
        """K - m of ids `emitted` (B, m). ValueError if it is not positive."""
        num = self.length - emitted.shape[1]
        if num < 1:
            raise ValueError(
                f"this head drafts {self.length} tokens after a hidden state; {emitted.shape[1]} leave none"
            )
        return num

    def num_tokens(self, given: Tensor) -> int:
        """n of ids or uniforms (B, n). ValueError unless 1 <= n <= K."""
        num = given.shape[1]
        if not 1 <= num <= self.length:
            raise ValueError(f"this head has 1 to {self.length} tokens a block, not {num}")
        return num

    @classmethod
    def can_pass(cls, passes: int, num: int) -> bool:
        """Whether `sample` can draft `num` tokens in `passes` passes."""
        match cls.passes:
            case "one":
                return passes == 1
            case "divisors":
                return passes >= 1 and num % passes == 0
            case "tokens":
                return 1 <= passes <= num
        return passes >= 1

    def check_passes(self, passes: int, num: int) -> None:
        """ValueError unless `can_pass`."""
        if not self.can_pass(passes, num):
            known = {
                "one": "1: one pass drafts all tokens", "divisors": f"a divisor of {num}",
                "tokens": f"1 to {num}, each at least one token", "any": "1 or more",
            }  # fmt: skip
            raise ValueError(f"passes = {passes} for {num} tokens: this head takes {known[type(self).passes]}")

    @abstractmethod
    def loss(self, call: JointCall, inputs: LossInputs) -> dict[str, Terms]:
        """Named (sum, count) terms."""

    def log_prob(self, call: JointCall, ids: Tensor, key: Key) -> LogProb:
        """Of ids (B, K). NotImplementedError if the family has neither value nor bound."""
        raise NotImplementedError(f"{type(self).__name__} has no likelihood")

    def conditionals(self, call: JointCall, ids: Tensor) -> Tensor:
        """(B, K, V): log q(. | x_<k) of the one-pass distribution. NotImplementedError if the family has none."""
        raise NotImplementedError(f"{type(self).__name__} has no conditionals")


def build_head(name: str, options: Mapping[str, Any], length: int, vocab_size: int, width: int) -> JointHead:
    """The head registered as `name`. ValueError with the nearest known name, or naming a wrong option."""
    kind = JOINT_HEADS.get(name)
    return kind(build(dict(options), kind.Config, f"joint.options ({name})"), length, vocab_size, width)
