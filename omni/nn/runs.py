"""The positions of one pass over the histories of many requests, without padding: attention run by run.

A pass is one batch row of N positions. A run is some neighbouring positions of it that belong to one history and see it
alike: text (causal), a block of latents or placeholders (every position sees all of its run), or one position. All runs
share the matrix products of a pass; attention is computed for each run on a view of its history.

A run sees the committed positions of its history, the slots of earlier runs of the pass in the same history, and
itself. So no mask is needed but the causal one; a window (sequence.mask) cuts the slots, and bands the causal mask.

Legend: N positions of a pass, H query heads, G key heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.nn.attention.backends import capped
from omni.nn.cache import History

QUERIES = 512  # of a causal run after earlier positions, in one call of attention: bounds the mask


@dataclass(frozen=True)
class Run:
    """Positions first to first + num of a pass, in slots `at` to `at + num` of the history.

    causal: each sees those of the run before it; else all. ranks: instead, each sees those of no higher rank. seen: the
    run sees that many positions of the history before its own (None: all), such as the finished ones where several
    blocks of a request are in refinement. adapted: whether an invoked LoRA of the history is active.
    """

    history: History
    first: int
    num: int
    at: int
    causal: bool
    ranks: tuple[int, ...] | None = None
    seen: int | None = None
    adapted: bool = False

    @property
    def lora(self) -> str | None:
        """The LoRA of its positions."""
        return self.history.lora if self.adapted or not self.history.invoked else None


class Runs:
    """The runs of a pass; they cover its positions in order. Call `History.reserve` before, `History.commit` after."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)
        self.pool = runs[0].history.pool
        self.num = sum(run.num for run in runs)
        self._slots: Tensor | None = None
        self._parts = [part for run in self.runs for part in _parts(run)]
        self._biases: dict[object, Tensor] = {}
        self._planned: dict[int | None, list] = {}

    def first(self, num: int) -> Runs:
        """The same without runs after the first `num` positions of each history."""
        runs, first = [], 0
        for run in self.runs:
            if run.at - run.history.length < num:
                runs.append(replace(run, first=first))
                first += run.num
        return Runs(runs)

    @property
    def gates(self) -> dict[str, Tensor | None]:
        """The LoRAs of the runs by name, and the positions that use each: (1, N, 1), 1 or 0; None: all."""
        names = [run.lora for run in self.runs]
        found: dict[str, Tensor | None] = {}
        for name in dict.fromkeys(filter(None, names)):
            found[name] = None
            if len(set(names)) > 1:
                gate = [float(own == name) for own, run in zip(names, self.runs, strict=True) for _ in range(run.num)]
                found[name] = torch.tensor(gate, device=self.pool.k.device)[None, :, None]
        return found

    @property
    def slots(self) -> Tensor:
        """(N,) int64: the slot in the pool of every position."""
        if self._slots is None:
            slots = [range(run.history.start + run.at, run.history.start + run.at + run.num) for run in self.runs]
            self._slots = torch.tensor([slot for run in slots for slot in run], device=self.pool.k.device)
        return self._slots

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None, cap: float | None = None
    ) -> Tensor:
        """Write k, v (1, G, N, D) of a layer; returns attention of q (1, H, N, D), in q's shape and dtype. window, cap:
        see LayerSpec."""
        keys, values = self.pool.k[layer], self.pool.v[layer]
        if len(self.runs) == 1:
            [run] = self.runs
            at = slice(run.history.start + run.at, run.history.start + run.at + run.num)
            keys[:, at], values[:, at] = k[0], v[0]
        else:
            keys.index_copy_(1, self.slots, k[0].to(keys.dtype))
            values.index_copy_(1, self.slots, v[0].to(values.dtype))
        wide, gqa, found = q.to(keys.dtype), q.shape[1] != keys.shape[0], []
        keys, values = keys[None], values[None]
        for where, slots, bias, causal in self._plan(wide, window):
            k_, v_ = (keys[:, :, slots], values[:, :, slots]) if isinstance(slots, slice) else (
                torch.cat([store[:, :, one] for one in slots], 2) for store in (keys, values)
            )  # fmt: skip
            if cap is not None:
                found.append(_capped(wide[:, :, where], k_, v_, bias, causal, cap))
                continue
            found.append(F.scaled_dot_product_attention(wide[:, :, where], k_, v_, bias, 0.0, causal, enable_gqa=gqa))
        return _with_nan(found[0] if len(found) == 1 else torch.cat(found, 2), q, k).to(q.dtype)

    def _plan(self, like: Tensor, window: int | None) -> list[Part]:
        """The parts of the pass; equal for all layers of one window."""
        if window not in self._planned:
            parts = self._parts if window is None else [part for run in self.runs for part in _parts(run, True)]
            self._planned[window] = [self._part(part, like, window) for part in parts]
        return self._planned[window]

    def _part(self, run: Run, like: Tensor, window: int | None) -> Part:
        start, before = run.history.start, run.at if run.seen is None else run.seen
        end = start + run.at + run.num
        hidden = 0 if window is None else max(0, before - window + 1)
        slots = slice(start + hidden, end)
        if before != run.at:
            slots = slice(start + hidden, start + before), slice(end - run.num, end)
        causal = run.causal and run.num > 1 and run.ranks is None
        banded = causal and window is not None and before + run.num > window
        before -= hidden
        needed = (causal and (before or banded)) or run.ranks is not None
        bias = self._bias(run, before, like, window if banded else None) if needed else None
        return Part(slice(run.first, run.first + run.num), slots, bias, causal and not needed)

    def _bias(self, run: Run, before: int, like: Tensor, window: int | None = None) -> Tensor:
        """(num, before + num): 0 where a position sees a key, else -inf."""
        key = run.num, before, run.ranks, like.dtype, window
        if key not in self._biases:
            seen = torch.ones(run.num, before + run.num, dtype=torch.bool, device=like.device)
            if run.ranks is None:
                seen = seen.tril(before)
                seen = seen if window is None else seen.triu(before - window + 1)
            else:
                ranks = torch.tensor(run.ranks, device=like.device)
                seen[:, before:] = ranks[None, :] <= ranks[:, None]
            bias = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
            self._biases[key] = bias.masked_fill_(~seen, -math.inf)
        return self._biases[key]


class Part(NamedTuple):
    """Positions of a pass, the slots that they see, their mask, and whether they are causal from the first slot on."""

    where: slice
    slots: slice | tuple[slice, slice]
    bias: Tensor | None
    causal: bool


def _capped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, cap: float) -> Tensor:
    """Attention of q (1, H, n, D) with capped scores, by explicit softmax."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = capped(q / math.sqrt(q.shape[-1]) @ k.mT, cap)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def _with_nan(out: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Attention whose result is NaN where a query or key is not finite. Without a mask the kernel of the CPU returns 0
    there (torch 2.13), which would hide damaged weights."""
    if q.device.type != "cpu" or math.isfinite(q.sum()) and math.isfinite(k.sum()):
        return out
    sound = q.isfinite().all(1).all(-1) & k.isfinite().all(1).all(-1)  # (1, N); sums of sound values may overflow
    return out.masked_fill(~sound[:, None, :, None], math.nan)


def _parts(run: Run, needs_mask: bool = False) -> list[Run]:
    """A long causal run after earlier positions, or one that needs a mask, in pieces of QUERIES."""
    if not run.causal or run.ranks is not None or run.num <= QUERIES or not (run.at or needs_mask):
        return [run]
    starts = range(0, run.num, QUERIES)
    return [replace(run, first=run.first + n, num=min(QUERIES, run.num - n), at=run.at + n) for n in starts]
