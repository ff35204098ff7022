"""A linear float64 backbone as the JointCall of heads, and shared functions of their tests.

Legend: B blocks, K tokens, V vocabulary, W width, n positions of a pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omni.heads.joint import JointHead, LossInputs, build_head
from omni.rng import Key
from omni.sequence.placeholders import Blocks

VOCABULARY, WIDTH = 3, 5


@dataclass
class TinyCall:
    """Contexts are vectors (B, W); the start is a linear map of them, computed once in one pass."""

    contexts: Tensor
    key: Key = field(default_factory=lambda: Key(7))
    passes: int = 0
    _start: Tensor | None = None

    def _matrix(self, name: str, rows: int) -> Tensor:
        return self.key.fold(name).normal((rows, WIDTH), torch.float64)

    @property
    def start(self) -> Tensor:
        if self._start is None:
            self.passes += 1
            self._start = torch.nn.functional.rms_norm(self.contexts @ self._matrix("backbone", WIDTH), (WIDTH,))
        return self._start

    def __call__(self, inputs: Tensor, causal: bool = True, clean: int = 0) -> Tensor:
        raise AssertionError("a head without placeholders makes no pass of its own")

    def embed(self, ids: Tensor) -> Tensor:
        return self._matrix("embedding", VOCABULARY)[ids]

    def read(self, hidden: Tensor) -> Tensor:
        return hidden @ self._matrix("unembedding", VOCABULARY).T

    def read_all(self, hidden: Tensor) -> Tensor:
        return self.read(hidden)

    def target(self) -> TinyCall:
        return self


def tiny_call(blocks: int = 2, repeat: int = 1, seed: int = 0) -> TinyCall:
    """`blocks` random contexts, each `repeat` times in a row."""
    contexts = Key(seed).fold("contexts").normal((blocks, WIDTH), torch.float64)
    return TinyCall(contexts.repeat_interleave(repeat, 0))


def tiny_head(name: str, length: int, seed: int = 0, size: float = 0.5, **options: object) -> JointHead:
    """A head in float64, initialised and perturbed, so that every weight has an effect."""
    head = build_head(name, options, length, VOCABULARY, WIDTH).double()
    head.initialise(Key(seed))
    with torch.no_grad():
        for parameter_name, parameter in head.named_parameters():
            draws = Key(seed).fold("alive", parameter_name).normal(tuple(parameter.shape), torch.float64)
            parameter.add_(draws * size)
    return head


def all_blocks(length: int) -> Tensor:
    """(V^K, K) int64: all blocks."""
    return torch.tensor(list(itertools.product(range(VOCABULARY), repeat=length)))


def codes(ids: Tensor) -> Tensor:
    """(B,) the index in `all_blocks` of each block (B, K)."""
    weights = VOCABULARY ** torch.arange(ids.shape[1] - 1, -1, -1)
    return (ids * weights).sum(-1)


@torch.no_grad()
def probabilities(head: JointHead, seed: int = 0) -> Tensor:
    """(2, V^K): the probability of every block after each of two contexts, by `log_prob`."""
    everything = all_blocks(head.length)
    call = tiny_call(2, len(everything), seed)
    found = head.log_prob(call, everything.repeat(2, 1), Key(0))
    assert found.kind == "exact"
    return found.value.exp().view(2, -1)


def total_variation(ids: Tensor, distribution: Tensor) -> float:
    """Total variation between the frequencies of blocks (N, K) and a distribution (V^K,)."""
    frequency = torch.bincount(codes(ids), minlength=len(distribution)).double() / len(ids)
    return float((frequency - distribution).abs().sum() / 2)


def lesson_of(ids: Tensor, lengths: list[int], progress: float = 1.0) -> LossInputs:
    """Blocks (B, K) that end after `lengths` tokens; ids past the end are 0, as in training."""
    valid = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    names = tuple((n, 0, 0) for n in range(len(ids)))
    return LossInputs(Blocks(ids * valid, valid, names), torch.zeros(0), Key(3), progress)


def worst_gradient_error(head: JointHead, value: Callable[[], Tensor], step: float = 1e-5) -> float:
    """Error against central differences, along a random direction of each parameter and along one of its entries."""
    gradients = dict(
        zip(dict(head.named_parameters()), torch.autograd.grad(value(), list(head.parameters())), strict=True)
    )
    worst = 0.0
    for name, parameter in head.named_parameters():
        one = torch.zeros_like(parameter)
        one.view(-1)[Key(1).fold(name).python().randrange(parameter.numel())] = 1.0
        for direction in (one, Key(2).fold(name).normal(tuple(parameter.shape), torch.float64)):
            with torch.no_grad():
                parameter.add_(step * direction)
                above = value()
                parameter.sub_(2 * step * direction)
                below = value()
                parameter.add_(step * direction)
            expected = float((above - below) / (2 * step))
            found = float((gradients[name] * direction).sum())
            worst = max(worst, abs(found - expected) / max(1.0, abs(expected)))
    return worst
