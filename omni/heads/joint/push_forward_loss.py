"""The loss of a push-forward head: noise for real data, by inverting it, and for what the head makes of fresh noise.

    decode       cross-entropy of O_j to x_j: falls to zero as the map is learned
    categorical  cross-entropy of C_j to x_j+1: falls to the data's entropy
    semigroup    on a share of blocks: cross-entropy of O_j, given fresh noise, to what two calls of the target make of
                 it, one after the other; zero where K tokens at once are what two shorter calls say

One pass with a graph carries all three: a block has either the noise of its data or fresh noise. The semigroup's calls
are cut after the first token (which is then plain decoding's) or in the middle, by a coin per batch, and the first
token of each is plain decoding's; progressive distillation of such maps is in arXiv 2606.10820.

Legend: B blocks, K tokens, S numbers of a token's noise, V vocabulary, W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from omni.heads.joint.base import JointCall, Lesson
from omni.heads.joint.noise_kinds import SMALLEST, draws_of
from omni.heads.joint.push_forward_bound import own_noise
from omni.terms import Terms

if TYPE_CHECKING:
    from omni.heads.joint.push_forward import PushForward


@dataclass(frozen=True)
class Task:
    """What the pass with a graph is asked: noise (B, K, S) and the ids (B, K) it should say. `counted` (B, K): where
    they count. `fresh` (B,): blocks whose ids are what shorter calls said."""

    noise: Tensor
    ids: Tensor
    counted: Tensor
    fresh: Tensor


def push_forward_terms(head: PushForward, call: JointCall, lesson: Lesson) -> dict[str, Terms]:
    """Terms "decode", "categorical" (where K > 1) and "semigroup", those whose weight is not zero."""
    return graded(head, call, set_task(head, call, lesson), lesson.teacher)


@torch.no_grad()
def set_task(head: PushForward, call: JointCall, lesson: Lesson) -> Task:
    """The noise of the data, and on the semigroup's share of blocks fresh noise with its targets. A token whose law
    gives it (nearly) no probability stands for no noise: it and those after it do not count."""
    blocks, share = lesson.blocks, head.config.semigroup_share
    device, shape = blocks.ids.device, (blocks.ids.shape[1], head.noise.size)
    draws = draws_of(blocks.names, shape, lesson.key.fold("noise")).to(device)
    if head.config.intervals == "own":
        noise, scores = own_noise(head, call, blocks.ids, draws)
    else:
        noise = head.noise.invert(lesson.teacher, blocks.ids, draws)
        scores = lesson.teacher.gather(-1, blocks.ids.unsqueeze(-1)).squeeze(-1)
    counted = blocks.valid & (scores > math.log(SMALLEST)).long().cumprod(-1).bool()
    fresh = torch.zeros(len(counted), dtype=torch.bool, device=device)
    if share == 0:
        return Task(noise, blocks.ids, counted, fresh)
    fresh = draws_of(blocks.names, (), lesson.key.fold("share")).to(device) < share
    free = head.noise.form(draws_of(blocks.names, shape, lesson.key.fold("fresh")).to(device))
    said = semigroup_targets(head, call, free, lesson)
    mine = fresh.unsqueeze(-1)
    noise = torch.where(mine.unsqueeze(-1), free, noise)
    return Task(noise, torch.where(mine, said, blocks.ids), torch.where(mine, blocks.valid, counted), fresh)


@torch.no_grad()
def semigroup_targets(head: PushForward, call: JointCall, noise: Tensor, lesson: Lesson) -> Tensor:
    """Ids (B, K) that two calls of the target say for noise (B, K, S)."""
    K = noise.shape[1]
    newest = max(lesson.blocks.names)  # the lesson's key is that of the run: it has no step in it
    cut = K // 2 if lesson.key.fold("cut", *newest).python().random() < 0.5 else 1
    cuts = [cut, K - cut] if 0 < cut < K else [K]
    return head.compose(call.target(), noise, cuts, "decode", "pick").ids


def graded(head: PushForward, call: JointCall, task: Task, teacher: Tensor) -> dict[str, Terms]:
    """One pass, and its terms. Nothing here is drawn."""
    config, K = head.config, task.ids.shape[1]
    hidden = call(head.placeholders(task.noise))[:, 1:]
    decay = config.decay ** torch.arange(K, device=hidden.device)
    of_data, of_fresh = task.counted & ~task.fresh.unsqueeze(-1), task.counted & task.fresh.unsqueeze(-1)
    terms = {}
    if config.decode_weight or config.semigroup_share:
        miss = _cross_entropy(head.decode(call, hidden), task.ids) * decay
        if config.decode_weight:
            terms["decode"] = _term(miss, of_data, config.decode_weight)
        if config.semigroup_share:
            terms["semigroup"] = _term(miss, of_fresh, config.semigroup_weight)
    if config.categorical_weight and K > 1:
        logits = call.read(hidden[:, :-1])
        if config.categorical_target == "teacher":
            log_c = _single(logits).log_softmax(-1)
            miss = -(teacher[:, 1:].exp().to(log_c.dtype) * log_c).sum(-1)
        else:
            miss = _cross_entropy(logits, task.ids[:, 1:])
        terms["categorical"] = _term(miss * decay[1:], of_data[:, 1:], config.categorical_weight)
    return terms


def _cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """(B, n) of logits (B, n, V)."""
    return cross_entropy(_single(logits).flatten(0, 1), ids.flatten(), reduction="none").unflatten(0, ids.shape)


def _single(logits: Tensor) -> Tensor:
    """In single precision or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _term(miss: Tensor, where: Tensor, weight: float) -> Terms:
    return Terms((miss * where).sum(), float(where.sum()), weight)
