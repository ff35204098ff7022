"""Masked-block heads on a small network and on an exact oracle, and slow reference distributions.

Legend: B blocks, K tokens, V vocabulary, W width, N strings of a joint's support or samples, M patterns.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from tiny_call import WIDTH, TinyCall, tiny_head
from torch import Tensor

from eval.experiments.joint.joints import Table
from omni.heads.joint import JointCall, build_head
from omni.heads.joint.masked import Masked
from omni.heads.joint.masked_sampling import reveal_sizes
from omni.rng import Key

K = 3


class SmallCall(TinyCall):
    """Placeholders that attend to one another, in two layers, and to their context."""

    def __call__(self, inputs: Tensor, causal: bool = True, clean: int = 0) -> Tensor:
        assert not causal and clean == 0
        self.passes += 1
        where = self._matrix("places", inputs.shape[1])
        one = torch.tanh(inputs @ self._matrix("first", WIDTH) + where)
        two = one + torch.tanh(one.mean(1, keepdim=True) * 4 @ self._matrix("second", WIDTH) + where)
        return torch.cat([self.contexts.unsqueeze(1), two + self.contexts.unsqueeze(1)], 1)


def small_call(rows: int, seed: int = 0) -> SmallCall:
    return SmallCall(Key(seed).fold("context").normal((1, WIDTH), torch.float64).expand(rows, WIDTH))


def masked_head(length: int = K, seed: int = 0, **options: object) -> Masked:
    head = tiny_head("masked", length, seed, size=0.7, **options)
    assert isinstance(head, Masked)
    return head


@dataclass
class OracleCall:
    """A perfectly trained backbone: the exact distribution of every token given the revealed ones. Channels of the
    width: one per id, one for the mask, one for "revealed"."""

    joint: Table
    rows: int
    passes: int = 0

    @property
    def start(self) -> Tensor:
        return torch.zeros(self.rows, self.joint.vocab_size + 2, dtype=torch.float64)

    def __call__(self, inputs: Tensor, causal: bool = True, clean: int = 0) -> Tensor:
        assert not causal and clean == 0
        self.passes += 1
        V, length = self.joint.vocab_size, self.joint.length
        shown = inputs[..., V + 1] > 0.5
        assert torch.equal(inputs[..., V] > 0.5, ~shown)
        patterns, place = torch.where(shown, inputs[..., :V].argmax(-1), -1).unique(dim=0, return_inverse=True)
        fits = ((patterns.unsqueeze(1) == self.joint.ids) | (patterns.unsqueeze(1) < 0)).all(-1)  # (M, N)
        onehot = torch.nn.functional.one_hot(self.joint.ids, V).double().flatten(1)
        mass = ((fits * self.joint.p) @ onehot).view(len(patterns), length, V)
        distribution = torch.where(mass.sum(-1, keepdim=True) > 0, mass / mass.sum(-1, keepdim=True), 1 / V)
        hidden = torch.nn.functional.pad(distribution.log().clamp(min=-99), (0, 2))[place]
        return torch.cat([self.start.unsqueeze(1), hidden], 1)

    def embed(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(ids, self.joint.vocab_size + 2).double()

    def read(self, hidden: Tensor) -> Tensor:
        return hidden[..., : self.joint.vocab_size]

    def read_all(self, hidden: Tensor) -> Tensor:
        return self.read(hidden)

    def target(self) -> OracleCall:
        return self


def oracle_head(joint: Table, **options: object) -> Masked:
    V = joint.vocab_size
    head = build_head("masked", options, joint.length, V, V + 2).double()
    assert isinstance(head, Masked)
    with torch.no_grad():
        head.mask[V], head.shown[V + 1] = 1.0, 1.0
    return head


# ---- slow and obvious ----------------------------------------------------------------------------------------------


@torch.no_grad()
def score_in_order(head: Masked, call: JointCall, ids: Tensor, order: tuple[int, ...], sizes: list[int]) -> Tensor:
    """(B,) log-probability of ids (B, n) revealed in this order, `sizes` tokens in each pass."""
    shown, total, at = torch.zeros_like(ids, dtype=torch.bool), torch.zeros(len(ids), dtype=torch.float64), 0
    for size in sizes:
        distribution = head.log_probs(call, ids, shown)
        for k in order[at : at + size]:
            total += distribution[:, k].gather(-1, ids[:, k : k + 1]).squeeze(-1)
        shown = shown.clone()
        shown[:, list(order[at : at + size])] = True
        at += size
    return total


def ancestral_distribution(head: Masked, call: JointCall, ids: Tensor, passes: int) -> Tensor:
    """(B,) probabilities of ids: the mean over all orders."""
    orders = list(itertools.permutations(range(ids.shape[1])))
    sizes = reveal_sizes(ids.shape[1], passes, head.config.schedule)
    return torch.stack([score_in_order(head, call, ids, order, sizes).exp() for order in orders]).mean(0)
