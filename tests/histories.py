"""Histories of a model in one pool, and a joint-token call after them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omni.generation.context import append_of, run_context
from omni.generation.drafting import CacheCall
from omni.heads.joint.backbone import Backbone
from omni.nn.cache import History
from omni.nn.native_step import CompiledStep
from omni.sequence.layout import Span, TokenSpan


def text(ids: Sequence[int]) -> TokenSpan:
    return TokenSpan(list(ids), [False] * len(ids))


def read(
    model: Backbone, histories: Sequence[History], spans: Sequence[Sequence[Span]], pad_id: int = 0,
    step: CompiledStep | None = None,
) -> list[Tensor]:  # fmt: skip
    """Append spans to every history in one pass; the hidden states (n, W) of each."""
    appends = [append_of(history, one, pad_id) for history, one in zip(histories, spans, strict=True)]
    return run_context(model, appends, pad_id, step)[0]


def histories_of(model: Backbone, documents: Sequence[Sequence[Span]], pad_id: int = 0) -> list[History]:
    """New histories in one pool, which hold the documents."""
    pool = model.transformer.new_pool()
    histories = [History(pool) for _ in documents]
    with torch.no_grad():
        if documents and all(documents):
            read(model, histories, documents, pad_id)
    return histories


def call_behind(
    model: Backbone, documents: Sequence[Sequence[Span]], spans: Sequence[Sequence[Span]], pad_id: int = 0
) -> CacheCall:
    """A joint-token block after `spans`, which histories that hold the documents do not hold yet."""
    histories = histories_of(model, documents, pad_id)
    return CacheCall(
        model, [append_of(history, one, pad_id) for history, one in zip(histories, spans, strict=True)], pad_id
    )
