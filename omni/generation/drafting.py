"""The backbone's interface for a joint-token head after a cache (heads.joint.base.JointCall).

Legend: R batch rows, n positions of a pass, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omni.generation.context import Behind, append_all
from omni.heads.joint.backbone import Backbone, Reads, draft_pass, head_of
from omni.nn.cache import KVCache
from omni.nn.decode_step import TokenStep
from omni.sequence.layout import Span, TokenSpan
from omni.sequence.placeholders import Starts


class DraftReads(Reads):
    """What a head reads to draft; `unsound` (R,) marks batch rows whose logits were not finite."""

    unsound: Tensor | None = None

    def read(self, hidden: Tensor) -> Tensor:
        logits = super().read(hidden)
        wrong = ~logits.flatten(1).amax(1).isfinite()
        self.unsound = wrong if self.unsound is None else self.unsound | wrong
        return logits


class CacheCall(DraftReads):
    """A joint-token block after every batch row of a cache, and after `spans` that the cache does not hold yet. The
    first pass appends the spans and computes the placeholders, so a prompt, a picture or the last token needs no pass
    of its own. A batch row without spans does not change; its draft is undefined.

    step: computes that pass where possible, if every batch row appends the same number of ids.
    """

    def __init__(
        self,
        model: Backbone,
        cache: KVCache,
        spans: Sequence[Sequence[Span]],
        pad_id: int = 0,
        step: TokenStep | None = None,
    ) -> None:
        self.model, self.cache, self.spans, self.pad_id, self.step = model, cache, spans, pad_id, step
        self.passes = 0
        self._start: Tensor | None = None

    @property
    def start(self) -> Tensor:
        if self._start is None:
            width = self.model.transformer.c.width
            self._append(self.model.token.embedding.weight.new_zeros(len(self.spans), 0, width), True)
        assert self._start is not None
        return self._start

    def __call__(self, inputs: Tensor, causal: bool = True, clean: int = 0) -> Tensor:
        if self._start is None and not clean:
            return self._append(inputs, causal)
        start = self.start.unsqueeze(1)
        self.passes += 1
        device, cache = inputs.device, self.cache
        rows, zeros = torch.arange(cache.rows, device=device), torch.zeros(cache.rows, dtype=torch.int64, device=device)
        block, position = (torch.tensor(field, device=device) for field in (cache.next_block, cache.next_position))
        starts = Starts(rows, zeros, zeros, block, position, 1)
        return torch.cat([start, draft_pass(self.model, inputs, starts, cache.memory(), causal, clean)], 1)

    def target(self) -> CacheCall:
        return self

    def _append(self, inputs: Tensor, causal: bool) -> Tensor:
        """The first pass; (R, 1 + n, W), the start first."""
        self.passes += 1
        joint, n = head_of(self.model), inputs.shape[1]
        ids = [row[0].ids if len(row) == 1 and isinstance(row[0], TokenSpan) else [] for row in self.spans]
        num = len(ids[0])
        even = num > 0 and all(len(row) == num for row in ids)
        if self.step is not None and joint.adapters is not None and even and self.step.supports(self.cache):
            tokens = self.embed(torch.tensor(ids, device=inputs.device))
            hidden = self.step.draft(tokens, inputs, self.cache, joint.adapters.gated(None), causal)
            self._start = hidden[:, num - 1]
            return hidden[:, num - 1 :]
        behind = Behind(inputs, joint.adapters, joint.depth, causal) if n else None
        hidden, valid = append_all(self.model, self.cache, self.spans, self.pad_id, behind)
        last = torch.tensor([max(k - 1, 0) for k in valid], device=hidden.device)
        self._start = hidden[torch.arange(len(valid), device=hidden.device), last]
        return torch.cat([self._start.unsqueeze(1), hidden[:, hidden.shape[1] - n :]], 1)


class StateCall(DraftReads):
    """Hidden states (R, W) of an earlier pass; computes no pass."""

    def __init__(self, model: Backbone, start: Tensor) -> None:
        self.model, self.start = model, start
        self.passes = 0

    def __call__(self, inputs: Tensor, causal: bool = True, clean: int = 0) -> Tensor:
        raise ValueError("this head reads placeholders; it cannot draft from a hidden state alone")

    def target(self) -> StateCall:
        return self
