"""The contract of joint-token heads: K tokens from one pass of the backbone, from a joint distribution.

A head sees the backbone as a `JointCall` and nothing else of the model. It says how it reads one pass:

    none     no placeholders: everything is read off the hidden state of the block's start
    causal   K placeholders, each seeing those before it
    block    K placeholders that see one another

and gives, from that pass, K ids; where its family has them, their exact (or bounded) log-probability and the
conditionals q(x_k | x_<k), which rejection verification needs. Noise comes in as uniforms (B, K), one per token, so
that a head that can do so draws pick(q_k, u_k) (see samplers.inverse_cdf), as plain decoding does with p_k:
verification by common noise then accepts as often as the two laws allow (see samplers.verification).

Legend: B blocks, K tokens of a block, V vocabulary, W width, n positions of a pass.
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
    """The backbone behind B contexts. `passes` counts the passes made through it by this call and what came of it."""

    @property
    def passes(self) -> int: ...

    @property
    def start(self) -> Tensor:
        """(B, W): the hidden state after the context; `read` of it gives the first token's logits."""
        ...

    def __call__(self, inputs: Tensor, causal: bool = True, clean: int = 0) -> Tensor:
        """One pass over n positions after the context: inputs (B, n, W) -> hidden (B, 1 + n, W), `start` first.

        The first `clean` inputs are embedded ids, which see what text sees; the others are placeholders.
        """
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """(..., W) of ids, as the context stream embeds them."""
        ...

    def read(self, hidden: Tensor) -> Tensor:
        """(..., V): next-token logits of hidden states."""
        ...

    def target(self) -> JointCall:
        """The same call, of the same weights, without a graph."""
        ...


class After:
    """A call whose context has been continued by clean ids (B, m): nothing is cached, they ride along in each pass."""

    def __init__(self, call: JointCall, ids: Tensor) -> None:
        self.call, self.ids = call, ids
        self._start: Tensor | None = None

    @property
    def passes(self) -> int:
        return self.call.passes

    @property
    def start(self) -> Tensor:
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

    def target(self) -> JointCall:
        return After(self.call.target(), self.ids)


@dataclass(frozen=True)
class Draft:
    """n ids of every block. `log_q` (B, n, V): the laws the ids were drawn from, each given what precedes it and noise
    that is independent of what verification draws; None where the head knows none. `steps`: of the head itself, draws
    or small networks that wait for one another."""

    ids: Tensor  # (B, n) int64
    log_q: Tensor | None = None
    steps: int = 1


@dataclass(frozen=True)
class LogProb:
    """(B,) log-probability of whole blocks in nats, under the one-pass law unless the head says of which. kind "bound":
    a lower bound."""

    value: Tensor
    kind: Literal["exact", "bound"]


@dataclass(frozen=True)
class Lesson:
    """What a loss may read besides the ids: `teacher` (B, K, V) float64 log P(. | c, x_<k) of the model's own
    autoregressive pass, without a graph; `progress`: the share of training that is done."""

    blocks: Blocks
    teacher: Tensor
    key: Key
    progress: float = 1.0


class JointHead(nn.Module, ABC):
    """A head of K = `length` tokens over V ids, on a backbone of width W. Options are a frozen config of its own.

    layout: see the head of this file. exact: `log_prob` is exact. universal: any joint, capacity permitting.
    needs_teacher: `loss` reads Lesson.teacher. order: whether positions depend left to right or in any order.
    passes: how many passes `sample` can make over n tokens: one, a divisor of n, up to n, or any number.
    conditional: `conditionals` gives q(x_k | x_<k) of the one-pass law, so that rejection and block verification hold.
    carries_on: `carry_on` drafts from a hidden state of text and what was said since, without a pass of the backbone.
    """

    layout: ClassVar[Literal["none", "causal", "block"]] = "none"
    exact: ClassVar[bool] = False
    universal: ClassVar[bool] = False
    needs_teacher: bool = False
    conditional: ClassVar[bool] = False
    carries_on: ClassVar[bool] = False
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
                fill(parameter, declared[name], key)
            elif parameter.ndim < 2:
                parameter.zero_()
            else:
                draws = key.fold(name).normal(tuple(parameter.shape))
                parameter.copy_(draws / math.sqrt(parameter.shape[-1]))

    @abstractmethod
    def sample(self, call: JointCall, uniforms: Tensor, key: Key, passes: int = 1) -> Draft:
        """n ids per block from `passes` passes (one, unless the head refines). uniforms (B, n) float64 in [0, 1), n at
        most K: the noise of the tokens; `key` gives whatever else is drawn. As many blocks as the call has."""

    def carry_on(self, call: JointCall, said: Tensor) -> Generator[Tensor, Tensor, None]:
        """Logits (B, V) of one id after another, at most K - m, behind ids `said` (B, m) that followed call.start and
        that no pass has read; is sent the ids (B,) that were chosen. Heads with `carries_on` alone."""
        raise NotImplementedError(f"{type(self).__name__} drafts from a pass of the backbone alone")

    def fits(self, given: Tensor) -> int:
        """n of ids or uniforms (B, n). ValueError if that is not 1 to K."""
        num = given.shape[1]
        if not 1 <= num <= self.length:
            raise ValueError(f"this head has 1 to {self.length} tokens a block, not {num}; ask for no more")
        return num

    @classmethod
    def can_pass(cls, passes: int, num: int) -> bool:
        """Whether `sample` can draw `num` tokens in so many passes."""
        match cls.passes:
            case "one":
                return passes == 1
            case "divisors":
                return passes >= 1 and num % passes == 0
            case "tokens":
                return 1 <= passes <= num
        return passes >= 1

    def check_passes(self, passes: int, num: int) -> None:
        """ValueError if `can_pass` says no."""
        if not self.can_pass(passes, num):
            known = {
                "one": "1, for it draws all of its tokens from one pass", "divisors": f"a divisor of {num}",
                "tokens": f"1 to {num}, one token or more in each", "any": "1 or more",
            }  # fmt: skip
            raise ValueError(f"passes = {passes} for {num} tokens: this head takes {known[type(self).passes]}")

    @abstractmethod
    def loss(self, call: JointCall, lesson: Lesson) -> dict[str, Terms]:
        """Named (sum, count) terms."""

    def log_prob(self, call: JointCall, ids: Tensor, key: Key) -> LogProb:
        """Of ids (B, K). NotImplementedError where the family has neither value nor bound."""
        raise NotImplementedError(f"{type(self).__name__} has no likelihood")

    def conditionals(self, call: JointCall, ids: Tensor) -> Tensor:
        """(B, K, V): log q(. | x_<k) of the one-pass law. NotImplementedError where the family has none."""
        raise NotImplementedError(f"{type(self).__name__} has no conditionals")


def build_head(name: str, options: Mapping[str, Any], length: int, vocab_size: int, width: int) -> JointHead:
    """The head registered as `name`. ValueError with the nearest known name, or naming a wrong option."""
    kind = JOINT_HEADS.get(name)
    return kind(build(dict(options), kind.Config, f"joint.options ({name})"), length, vocab_size, width)
