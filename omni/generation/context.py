"""Append finished spans and ids to a cache: prefill, commit of a picture, one text step. This file decides nothing.

Legend: R batch rows, N positions, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni.heads.joint.backbone import Backbone
from omni.nn.cache import KVCache
from omni.nn.decode_step import TokenStep
from omni.nn.lora import Adapters, Gated
from omni.nn.tail import Tail
from omni.sequence.layout import Span, Stream, TokenSpan, context_tensors, grid_positions, lay_out


@dataclass(frozen=True)
class Behind:
    """Placeholders (R, n, W) of joint tokens after the appended spans, and their adapters in the last layers."""

    inputs: Tensor
    adapters: Adapters | None
    depth: int
    causal: bool

    def gated(self, num: int) -> list[Gated | None]:
        """The adapters of each layer; their gate is 0 at the `num` positions before the placeholders."""
        if self.adapters is None:
            return [None] * self.depth
        gate = torch.ones(1, num + self.inputs.shape[1], 1, device=self.inputs.device)
        gate[:, :num] = 0
        return [*self.adapters.gated(gate)]


def append_ids(model: Backbone, cache: KVCache, ids: Sequence[int], step: TokenStep) -> Tensor:
    """Append one text id to every batch row; returns hidden states (R, W). Uses TokenStep where possible, else
    `extend`."""
    tensor = torch.tensor(ids, device=model.token.embedding.weight.device)
    if step.supports(cache):
        return step.step(model.token.embed(tensor), cache)
    return append_spans(model, cache, [[TokenSpan([i], [False])] for i in ids], 0)


def append_spans(model: Backbone, cache: KVCache, spans: Sequence[Sequence[Span]], pad_id: int) -> Tensor:
    """Append spans to every batch row in one pass; returns the hidden state (R, W) of each row's last position.

    A batch row without spans does not change; its hidden state is undefined.
    """
    hidden, valid = append_all(model, cache, spans, pad_id)
    last = torch.tensor([max(n - 1, 0) for n in valid], device=hidden.device)
    return hidden[torch.arange(len(valid), device=hidden.device), last]


def append_all(
    model: Backbone, cache: KVCache, spans: Sequence[Sequence[Span]], pad_id: int, tail: Behind | None = None
) -> tuple[Tensor, list[int]]:
    """Like `append_spans`; returns the hidden state of every position (R, N, W) and the number of positions of each
    batch row. With a tail, the hidden states of its placeholders follow: (R, N + n, W)."""
    device = model.token.embedding.weight.device
    laid = [
        lay_out(row, pad_id, start_position=cache.next_position[r], start_block=cache.next_block[r])
        for r, row in enumerate(spans)
    ]
    num = max(len(one.ids) for one in laid)
    rows = context_tensors([[one] for one in laid], num, model.flow.c.channels, pad_id)
    latents = rows.latents.to(device) if bool(rows.is_latent.any()) else None
    is_latent, block, position = (part.to(device) for part in (rows.is_latent, rows.block, rows.position))
    h = model.embed_context(rows.ids.to(device), latents, is_latent)
    behind = None
    if tail is not None:
        block_R = torch.tensor([one.next_block for one in laid], device=device)
        position_R = torch.tensor([one.next_position for one in laid], device=device)
        behind = Tail(tail.inputs, block_R, position_R, tail.gated(num), tail.causal)
    hidden = model.transformer.extend(h, block, position, is_latent, cache, rows.valid, behind)
    for r, one in enumerate(laid):
        cache.next_position[r], cache.next_block[r] = one.next_position, one.next_block
    return hidden, rows.valid


def append_text(model: Backbone, cache: KVCache, ids: Sequence[list[int]], step: TokenStep, pad_id: int) -> Tensor:
    """Append text ids to every batch row; returns hidden states (R, N, W). Uses TokenStep where possible and all rows
    have equal length, else `extend`."""
    if step.supports(cache) and len({len(row) for row in ids}) == 1:
        tensor = torch.tensor(ids, device=model.token.embedding.weight.device)
        return step.append(model.token.embed(tensor), cache)
    return append_all(model, cache, [[TokenSpan(row, [False] * len(row))] if row else [] for row in ids], pad_id)[0]


def refine_stream(cache: KVCache, grid: tuple[int, int, int], device: torch.device | str) -> Stream:
    """The layout of one block per batch row, after the cached positions of that row."""
    R = cache.rows
    position = torch.tensor([grid_positions(grid, p) for p in cache.next_position], device=device)
    N = position.shape[1]
    block = torch.tensor(cache.next_block, device=device)[:, None].expand(R, N)
    return Stream(torch.zeros_like(block), block, torch.ones_like(block), position)
