"""Trains heads on known joints and measures their distances from them: the slow part of a task.

For a joint and a seed the backbone is trained once; every head of a table then starts from a frozen copy of it. A head
with an exact likelihood is measured by it, on every string of the support; other heads by samples.

Legend: B rows, K tokens, V ids, N strings of the support.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from eval.experiments.joint.distances import Distances, of_samples, of_support
from eval.experiments.joint.joints import Table, build_joint
from eval.experiments.joint.training import Budget, beside, head_of, toy_batch, toy_call, toy_model, train, uniforms
from omni.config import Frozen
from omni.heads.joint import JOINT_HEADS, JointConfig, build_head
from omni.heads.joint.training import teacher_log_probs
from omni.model import Omni
from omni.rng import Key

CHUNK = 4096  # batch rows when measuring


class HeadLine(Frozen):
    """One line of the comparison: a head with its options, its training and its sampling.

    joints: to train on; none is all. teacher: the probabilities that give the noise of data, the backbone's own
    ("plain") or the joint's ("exact"), which excludes errors of the backbone. head_steps, rate: if not the run's.
    passes: numbers of passes, besides one, to sample in, for block lengths that allow them.
    """

    head: str
    options: dict[str, Any] = Field(default_factory=dict)
    joints: tuple[str, ...] = ()
    teacher: Literal["plain", "exact"] = "plain"
    head_steps: int | None = Field(default=None, ge=1)
    rate: float | None = Field(default=None, gt=0)
    passes: tuple[int, ...] = ()

    def numbers(self, length: int) -> list[int]:
        """Numbers of passes for blocks of `length` tokens, ascending, with 1."""
        head = JOINT_HEADS.get(self.head)
        return sorted({1, *(n for n in self.passes if head.can_pass(n, length))})


class LabOptions(Frozen):
    """Options of the model (width, depth, adapter_rank of placeholders), of training, and num_samples to measure."""

    width: int = Field(default=64, ge=8, multiple_of=4)
    depth: int = Field(default=2, ge=1)
    adapter_rank: int = Field(default=64, ge=0)
    backbone_steps: int = Field(default=2000, ge=1)
    head_steps: int = Field(default=3000, ge=1)
    rows: int = Field(default=256, ge=1)
    rate: float = Field(default=2e-3, gt=0)
    num_samples: int = Field(default=200_000, ge=1)

    @property
    def budget(self) -> Budget:
        """Steps, rows and rate as `train` takes them."""
        return Budget(self.backbone_steps, self.head_steps, self.rows, self.rate)


@dataclass(frozen=True)
class Measured:
    """One head with one seed: distances by number of passes (one pass by exact likelihood or by samples), samples of
    one pass, and the processor time of its training."""

    distances: Mapping[int, Distances]
    exact: bool
    ids: Tensor  # (num_samples, K)
    seconds: float


@dataclass(frozen=True)
class Group:
    """All heads of one joint and seed. plain: the backbone's distribution, by autoregressive decoding in K passes."""

    plain: Distances
    heads: Mapping[str, Measured]


@cache
def known_table(name: str) -> Table:
    """The joint `name`; ValueError for one without a listed support, whose total variation cannot be computed."""
    joint = build_joint(name)
    if not isinstance(joint, Table):
        raise ValueError(f"joint {name!r} has too many strings to compare a head with; use a smaller one")
    return joint


def check_lines(joints: tuple[str, ...], lines: Mapping[str, HeadLine], options: LabOptions) -> None:
    """ValueError in advance for unknown joints and heads, wrong options, and a teacher without effect."""
    tables = [known_table(name) for name in joints]
    for name, line in lines.items():
        for other in line.joints:
            if other not in joints:
                raise ValueError(f"head {name!r} needs joint {other!r}, which is not among {', '.join(joints)}")
        for joint in tables:
            if not line.joints or joint.name in line.joints:
                head = build_head(line.head, line.options, joint.length, joint.vocab_size + 1, options.width)
                if line.teacher == "exact" and not head.needs_teacher:
                    raise ValueError(f'head {name!r} has no use for a teacher; leave out teacher = "exact"')


def run_group(joint_name: str, lines: Mapping[str, HeadLine], options: LabOptions, key: Key) -> Group:
    """Train and measure. Depends on the arguments alone."""
    joint = known_table(joint_name)
    backbone = toy_model(None, joint.vocab_size, key.fold("model"), options.width, options.depth)
    draw = _block_sampler(joint)
    train(backbone, draw, replace(options.budget, head_steps=0), key.fold("train"))
    found = {}
    for name, line in lines.items():
        config = JointConfig(
            head=line.head, length=joint.length, adapter_rank=options.adapter_rank, options=line.options
        )
        model = beside(backbone, config, key.fold("model"))
        found[name] = _train_and_measure(model, joint, line, options, key.fold("head", name))
    return Group(plain_distances(backbone.eval(), joint), found)


def _train_and_measure(model: Omni, joint: Table, line: HeadLine, options: LabOptions, key: Key) -> Measured:
    """Train the head of a model on a joint, and measure it."""
    assert model.joint is not None
    head, start = model.joint.head, time.process_time()
    budget = replace(
        options.budget, backbone_steps=0, head_steps=line.head_steps or options.head_steps,
        rate=line.rate or options.rate,
    )  # fmt: skip
    teacher = (lambda prefix, ids: exact_distributions(joint, ids)) if line.teacher == "exact" else None
    train(model, _block_sampler(joint), budget, key.fold("train"), teacher)
    seconds = time.process_time() - start
    model.eval()
    numbers = line.numbers(joint.length)
    draws = {n: draw_ids(model, joint.length, options.num_samples, key.fold("draws"), n) for n in numbers}
    distances = {n: of_samples(joint, ids) for n, ids in draws.items()}
    if head.exact:
        distances[1] = replace(of_support(joint, support_scores(model, joint)), entropy=distances[1].entropy)
    return Measured(distances, head.exact, draws[1], seconds)


def exact_distributions(joint: Table, ids: Tensor) -> Tensor:
    """(B, K, V) float64: log P(x_k | x_<k) of the joint, over the ids of the model."""
    log_probs = joint.conditionals(ids)
    return torch.cat([log_probs, log_probs.new_full((*log_probs.shape[:2], 1), -math.inf)], -1)


def _block_sampler(joint: Table):  # noqa: ANN202
    """A function that samples blocks of the joint, without prefixes."""
    return lambda key, num: (torch.zeros(num, 0, dtype=torch.int64), joint.draw(key, num))


@torch.inference_mode()
def draw_ids(model: Omni, length: int, num: int, key: Key, passes: int = 1) -> Tensor:
    """(num, length) int64 from the model's head, unconditionally."""
    found = []
    for at in range(0, num, CHUNK):
        rows = min(CHUNK, num - at)
        call = toy_call(model, torch.zeros(rows, 0, dtype=torch.int64), length)
        own = key.fold("chunk", at)
        found.append(head_of(model).sample(call, uniforms(rows, length, own), own, passes).ids)
    return torch.cat(found)


@torch.inference_mode()
def support_scores(model: Omni, joint: Table) -> Tensor:
    """(N,) float64: the head's log-probability of every string of the support."""
    found = []
    for ids in joint.ids.split(CHUNK):
        call = toy_call(model, torch.zeros(len(ids), 0, dtype=torch.int64), joint.length)
        found.append(head_of(model).log_prob(call, ids, Key(0)).value)
    return torch.cat(found)


@torch.inference_mode()
def plain_distances(model: Omni, joint: Table) -> Distances:
    """Distances of the model's autoregressive distribution, on the support."""
    found = []
    for ids in joint.ids.split(CHUNK):
        batch, starts, blocks = toy_batch(torch.zeros(len(ids), 0, dtype=torch.int64), ids, joint.vocab_size)
        log_probs = teacher_log_probs(model, model.context(batch)[0], starts, blocks)
        found.append(log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1).sum(-1))
    return of_support(joint, torch.cat(found))
