"""The interface of the backbone to joint-token heads, and one pass of it over blocks of tokens.

Legend: B blocks of tokens, n positions of a pass, V vocabulary, W width, R batch rows, T context positions.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from omni.heads.flow import FlowHead
from omni.heads.joint.tokens import JointTokens
from omni.heads.token import TokenHead
from omni.nn.cache import Memory
from omni.nn.lora import Gated
from omni.nn.runs import Runs
from omni.nn.transformer import Transformer
from omni.sequence.features import Features
from omni.sequence.placeholders import Starts, block_stream


class Backbone(Protocol):
    """A transformer with its heads: `omni.model.Omni`, or a small model of an experiment."""

    @property
    def transformer(self) -> Transformer: ...

    @property
    def token(self) -> TokenHead: ...

    @property
    def flow(self) -> FlowHead | None: ...

    @property
    def joint(self) -> JointTokens | None: ...

    def embed_context(
        self, ids: Tensor, latents: Tensor | None, is_latent: Tensor | None, features: Features | None = None
    ) -> Tensor:
        """Inputs (R, T, W) of the context stream, from ids (R, T), from latents (R, T, C) where is_latent (R, T), and
        from features where they stand."""
        ...


class Reads:
    """Base of all calls of a head: the token head embeds ids and computes logits."""

    model: Backbone

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.token.embed(ids)

    def read(self, hidden: Tensor) -> Tensor:
        return self.model.token.read(hidden, head_of(self.model).c.vocabulary)

    def read_all(self, hidden: Tensor) -> Tensor:
        return self.model.token.read(hidden)


def draft_pass(
    model: Backbone, inputs: Tensor, starts: Starts, memory: Memory | Runs, causal: bool, clean: int
) -> Tensor:
    """One pass over blocks (B, n, W), of which the first `clean` inputs are clean tokens -> (B, n, W).

    Placeholders pass through the last layers only (JointConfig.depth); clean tokens pass through all.
    """
    joint = head_of(model)
    top = range(model.transformer.c.depth - joint.depth, model.transformer.c.depth)
    if clean and top.start:
        below_memory = memory.first(clean) if isinstance(memory, Runs) else memory
        below = _layers(model, inputs[:, :clean], starts, below_memory, True, clean, range(top.start))
        inputs = torch.cat([below, inputs[:, clean:].to(below.dtype)], 1)
    return _layers(model, inputs, starts, memory, causal, clean, top)


def _layers(
    model: Backbone, inputs: Tensor, starts: Starts, memory: Memory | Runs, causal: bool, clean: int, layers: range
) -> Tensor:
    """The layers of `draft_pass` in `layers`."""
    B, n, W = inputs.shape
    per_row, adapters = starts.per_row, head_of(model).adapters
    gated: list[Gated | None] = [None] * len(layers)
    if adapters is not None and clean < n:
        gate = None
        if clean:
            at = torch.arange(n, device=inputs.device) >= clean
            gate = at.to(inputs.dtype).repeat(per_row)[None, :, None]
        gated = [*adapters.gated(gate)]
    h = inputs.reshape(B // per_row, per_row * n, W)
    stream = block_stream(starts, n, causal, clean)
    return model.transformer.draft(h, stream, memory, gated, layers).reshape(B, n, W)


def head_of(model: Backbone) -> JointTokens:
    """The model's joint-token head. ValueError if it has none."""
    if model.joint is None:
        raise ValueError(
            'this model has no joint-token head; train one with heads.joint = {head = "push_forward"} and '
            'the objective "joint_tokens", or set tokens_per_pass = 1'
        )
    return model.joint
