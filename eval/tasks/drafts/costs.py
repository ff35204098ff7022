"""Measured costs of passes and of drafts, and the rate of decoding that they predict.

With acceptance a_j, the share of rounds that accept at least j drafted tokens, a round with K of them emits
1 + a_1 + ... + a_K tokens and costs a pass of K + 1 positions of each request, a draft, and what is done with the
logits of each position (sampling). So K can be chosen, and rates of batches predicted, from costs that are measured
once.

Legend: K drafted tokens, B requests, W width.
"""

from __future__ import annotations

import bisect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from omni.generation.context import NATIVE, append_of, run_context
from omni.generation.drafting import StateCall
from omni.model import Omni
from omni.nn.cache import History
from omni.nn.native_step import CompiledStep
from omni.sequence.layout import TokenSpan

CONTEXT = 128  # positions of every history before a measured pass


@dataclass(frozen=True)
class Costs:
    """Seconds by number of positions or tokens, linear between measured numbers."""

    seconds: Mapping[int, float]

    def __call__(self, num: int) -> float:
        """Seconds of `num`; beyond the largest measured number in proportion to it."""
        known = sorted(self.seconds)
        if num >= known[-1]:
            return self.seconds[known[-1]] * num / known[-1]
        at = bisect.bisect_left(known, num)
        high = known[at]
        if high == num or at == 0:
            return self.seconds[high]
        low = known[at - 1]
        share = (num - low) / (high - low)
        return (1 - share) * self.seconds[low] + share * self.seconds[high]


def _median(run: Callable[[], object], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def histories_of(model: Omni, num: int) -> list[History]:
    """Histories of CONTEXT ids each."""
    pool = model.transformer.new_pool()
    found = [History(pool) for _ in range(num)]
    spans = [TokenSpan(list(range(100, 100 + CONTEXT)), [False] * CONTEXT)]
    for history in found:
        run_context(model, [append_of(history, spans, 0)])
    return found


@torch.inference_mode()
def pass_costs(model: Omni, native: CompiledStep | None, batch: int, lengths: Sequence[int], repeats: int) -> Costs:
    """Passes of `batch` requests with so many positions each, and their logits, by number of positions of one. Native
    code computes at most NATIVE positions in a pass; longer ones are eager, as in the engine."""
    histories = histories_of(model, batch)
    bases = [(one.length, one.next_position, one.next_block) for one in histories]

    def run(num: int) -> None:
        spans = [TokenSpan(list(range(300, 300 + num)), [False] * num)]
        hidden, _ = run_context(model, [append_of(one, spans, 0) for one in histories], 0, native)
        states = torch.cat(hidden)
        model.token.read(states) if native is None else native.read(states)
        for one, base in zip(histories, bases, strict=True):
            one.truncate(*base)

    assert native is None or NATIVE > 1
    return Costs({num: _median(partial(run, num), repeats) for num in lengths})


@torch.inference_mode()
def draft_costs(model: Omni, native: CompiledStep | None, batch: int, lengths: Sequence[int], repeats: int) -> Costs:
    """Drafts of so many tokens after hidden states of `batch` requests, greedily."""
    assert model.joint is not None
    head, histories = model.joint.head, histories_of(model, batch)
    weight = model.token.embedding.weight
    states = weight.new_ones(batch, weight.shape[1])
    last = torch.full((batch, 1), 300)

    def run(num: int) -> None:
        call = StateCall(model, states, histories, native)
        drafting = head.draft_recurrently(call, last, torch.full((batch, num), 0.5, dtype=torch.float64))
        ids = next(drafting).argmax(-1)
        for _ in range(num - 1):
            ids = drafting.send(ids).argmax(-1)

    return Costs({num: _median(partial(run, num), repeats) for num in lengths})


@dataclass(frozen=True)
class Round:
    """What a choice of K predicts: tokens per round and request, and tokens per second of all requests."""

    num_drafted: int
    emitted: float
    rate: float


def best_round(
    acceptance: Sequence[float], passes: Costs, drafts: Costs, per_position: float = 0.0, batch: int = 1
) -> Round:
    """The K of the largest predicted rate, at least 2 (the engine drafts no fewer). per_position: seconds beyond the
    pass, for each position of each request."""
    rounds = []
    for num in range(min(2, len(acceptance)), len(acceptance) + 1):
        emitted = 1 + sum(acceptance[:num])
        seconds = passes(num + 1) + drafts(num) + per_position * (num + 1) * batch
        rounds.append(Round(num, emitted, batch * emitted / seconds))
    return max(rounds, key=lambda one: one.rate)
