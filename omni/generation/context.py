"""The context pass: spans of many requests, appended to their histories in one pass. This file decides nothing.

Legend: N positions of the pass, n positions of one append, P placeholders of the pass, W width, B appends.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni.heads.joint.backbone import Backbone, head_of
from omni.nn.cache import History
from omni.nn.native_step import CompiledStep
from omni.nn.runs import Run, Runs
from omni.nn.tail import Tail
from omni.sequence.features import FeatureSpan
from omni.sequence.layout import (
    LaidOut,
    Span,
    Stream,
    TokenSpan,
    context_tensors,
    grid_positions,
    lay_out,
    num_context,
)

NATIVE = 64  # most positions of a pass of the native step; matrix products are faster beyond


@dataclass(frozen=True)
class Append:
    """Spans that one history does not hold yet, laid out after it. marks: see `History`."""

    history: History
    laid: LaidOut
    marks: list[int]

    def __len__(self) -> int:
        return len(self.laid.ids)

    @property
    def is_text(self) -> bool:
        return all(map(self.laid.is_text, range(len(self))))

    def runs(self, first: int) -> Iterator[Run]:
        """Runs of the positions, the first at `first` of the pass: causal runs of text, and blocks."""
        laid, a, at = self.laid, 0, self.history.length
        splits = self.history.invoked
        for b in range(1, len(laid.ids) + 1):
            text = laid.is_text(a)
            is_end = b == len(laid.ids) or laid.is_text(b) != text or (not text and laid.block[b] != laid.block[a])
            if is_end or (splits and laid.adapted[b] != laid.adapted[a]):
                yield Run(self.history, first + a, b - a, at + a, causal=text, adapted=splits and laid.adapted[a])
                a = b

    def part(self, start: int, stop: int) -> Append:
        """Positions start to stop, for a pass of its own."""
        laid, end = self.laid, stop == len(self)
        at = laid.next_position if end else laid.position[stop][0]
        block = laid.next_block if end else laid.block[stop]
        cut = slice(start, stop)
        part = LaidOut(
            laid.ids[cut], laid.latents[cut], laid.supervise[cut], laid.block[cut], laid.position[cut], [], at, block,
            laid.features[cut], adapted=laid.adapted[cut],
        )  # fmt: skip
        return Append(self.history, part, self.marks[cut])

    def legal_stop(self, most: int) -> int:
        """The largest stop of a part from 0 with at most `most` positions that cuts no block; the end of the first
        block where that alone is longer."""
        block, n = self.laid.block, len(self)
        stop = min(most, n)
        while 0 < stop < n and block[stop] == block[stop - 1]:
            stop -= 1
        while stop == 0 or (stop < n and block[stop] == block[stop - 1]):
            stop += 1
        return stop


def append_of(history: History, spans: Sequence[Span], pad_id: int) -> Append:
    """The spans, laid out after a history."""
    laid = lay_out(spans, pad_id, start_position=history.next_position, start_block=history.next_block)
    return Append(history, laid, marks_of(spans))


def marks_of(spans: Sequence[Span]) -> list[int]:
    """One number per position: the id of a token; for others a negative number, by the digest of their block."""
    marks: list[int] = []
    for span in spans:
        if isinstance(span, TokenSpan):
            marks += span.ids
            continue
        kind, values = ("features", span.features) if isinstance(span, FeatureSpan) else ("", span.latents)
        data = values.detach().float().cpu().contiguous().numpy().tobytes()
        digest = hashlib.blake2b(kind.encode() + repr(span.grid).encode() + data, digest_size=8)
        first = int.from_bytes(digest.digest(), "little") >> 1
        marks += [-1 - first - k for k in range(num_context(span))]
    return marks


def run_context(
    model: Backbone,
    appends: Sequence[Append],
    pad_id: int = 0,
    step: CompiledStep | None = None,
    placeholders: Tensor | None = None,
    causal: bool = True,
) -> tuple[list[Tensor], Tensor]:
    """One pass that writes and commits all appends. Returns the hidden states (n, W) of each append, and those of
    placeholders (B, m, W) after the first B appends, which are not committed.

    placeholders: inputs (B, m, W). causal: each sees those before it; else all of its block. step: native code, used
    where it can compute the pass.
    """
    lengths = [len(one) for one in appends]
    B, m = (0, 0) if placeholders is None else placeholders.shape[:2]
    for b, one in enumerate(appends):
        one.history.reserve(len(one) + (m if b < B else 0))
    runs, first = [], 0
    for one in appends:
        runs += one.runs(first)
        first += len(one)
    made = Runs(runs)
    if step is not None and not m and made.num <= NATIVE and all(one.is_text for one in appends):
        ids = [token for one in appends for token in one.laid.ids]
        positions = [position[0] for one in appends for position in one.laid.position]
        hidden = step(model.token.embed(torch.tensor(ids)), positions, made)
    else:
        hidden = _pass(model, appends, made, pad_id, placeholders, causal)
    for one in appends:
        one.history.commit(len(one), one.laid.next_position, one.laid.next_block, one.marks)
    num = sum(lengths)
    behind = hidden[num:].view(B, m, hidden.shape[-1])
    return list(hidden[:num].split(lengths)), behind


def _pass(
    model: Backbone, appends: Sequence[Append], runs: Runs, pad_id: int, placeholders: Tensor | None, causal: bool
) -> Tensor:
    """Hidden states (N + P, W)."""
    device, num = model.token.embedding.weight.device, runs.num
    channels = 0 if model.flow is None else model.flow.c.channels
    rows = context_tensors([[one.laid for one in appends]], num, channels, pad_id)
    some = bool(rows.is_latent.any())
    is_latent = rows.is_latent.to(device) if some else None
    latents, features = (rows.latents.to(device) if some else None), rows.features
    more = () if features is None else (features.to(device),)
    h = model.embed_context(rows.ids.to(device), latents, is_latent, *more)
    tail = None
    if placeholders is not None and placeholders.shape[1]:
        tail = _tail(model, appends[: len(placeholders)], runs, placeholders, causal)
    latent = False if is_latent is None else is_latent
    return model.transformer.extend(h, rows.position.to(device), latent, runs, tail)[0]


def _tail(model: Backbone, appends: Sequence[Append], runs: Runs, inputs: Tensor, causal: bool) -> Tail:
    joint, (B, m, W), num = head_of(model), inputs.shape, runs.num
    behind = [Run(one.history, num + b * m, m, one.history.length + len(one), causal) for b, one in enumerate(appends)]
    first = torch.tensor([one.laid.next_position for one in appends], device=inputs.device)
    position = (first[:, None] + torch.arange(m, device=inputs.device)).view(1, -1, 1).expand(1, -1, 3)
    adapters: list = [None] * joint.depth
    if joint.adapters is not None:
        gate = torch.ones(1, num + B * m, 1, device=inputs.device)
        gate[:, :num] = 0
        adapters = list(joint.adapters.gated(gate))
    return Tail(inputs.reshape(1, B * m, W), position, adapters, Runs([*runs.runs, *behind]))


Grid = tuple[int, int, int]


def group_runs(
    groups: Sequence[tuple[History, Sequence[tuple[Grid, int]], bool]], device: torch.device
) -> tuple[Stream, Runs]:
    """The refine stream (1, N) of blocks of latents that read one another after each history, and its runs. Reserves
    their slots.

    groups: (history, (grid, first rotary position after the history) of each block, is_causal). With is_causal a block
    reads the blocks of its group before it, else all of them.
    """
    runs, position, first = [], [], 0
    for history, blocks, is_causal in groups:
        own = [math.prod(grid) for grid, _ in blocks]
        ranks = tuple(b for b, num in enumerate(own) for _ in range(num)) if is_causal and len(own) > 1 else None
        num = sum(own)
        history.reserve(num)
        runs.append(Run(history, first, num, history.length, causal=False, ranks=ranks))
        for grid, start in blocks:
            position += grid_positions(grid, history.next_position + start)
        first += num
    where = torch.tensor([position], device=device)
    zeros = torch.zeros_like(where[..., 0])
    return Stream(zeros, zeros, zeros + 1, where), Runs(runs)


def block_runs(blocks: Sequence[tuple[History, Grid]], device: torch.device) -> tuple[Stream, Runs]:
    """`group_runs` of one block after each history."""
    return group_runs([(history, [(grid, 0)], False) for history, grid in blocks], device)


def placeholder_runs(histories: Sequence[History], num: int, causal: bool, clean: int = 0) -> Runs:
    """Runs of one block of tokens after each history: `clean` ids, then placeholders. Reserves their slots."""
    runs = []
    for b, history in enumerate(histories):
        history.reserve(num)
        if clean:
            runs.append(Run(history, b * num, clean, history.length, causal=True))
        if num > clean:
            runs.append(Run(history, b * num + clean, num - clean, history.length + clean, causal))
    return Runs(runs)
