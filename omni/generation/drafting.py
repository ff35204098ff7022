"""The backbone's interface for a joint-token head after histories (heads.joint.base.JointCall).

Legend: B histories, n positions of a pass, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omni.generation.context import Append, placeholder_runs, run_context
from omni.heads.joint.backbone import Backbone, Reads, draft_pass, head_of
from omni.nn.cache import History
from omni.nn.native_step import CompiledStep
from omni.sequence.placeholders import Starts


class DraftReads(Reads):
    """What a head reads to draft; `unsound` (B,) marks histories whose logits were not finite. native: the native step,
    which then reads the output projection."""

    unsound: Tensor | None = None
    native: CompiledStep | None = None

    def read(self, hidden: Tensor) -> Tensor:
        logits = self._logits(hidden, head_of(self.model).c.vocabulary)
        wrong = ~logits.flatten(1).amax(1).isfinite()
        self.unsound = wrong if self.unsound is None else self.unsound | wrong
        return logits

    def read_all(self, hidden: Tensor) -> Tensor:
        return self._logits(hidden, None)

    def _logits(self, hidden: Tensor, num: int | None) -> Tensor:
        if self.native is None:
            return self.model.token.read(hidden, num)
        rows = self.native.read(hidden.flatten(0, -2), num)
        return self.model.token.cap(rows.unflatten(0, hidden.shape[:-1]))


class CacheCall(DraftReads):
    """A joint-token block after each of B histories, and after spans that they do not hold yet. The first pass appends
    the spans and computes the placeholders, so a prompt, a picture or the last token needs no pass of its own.

    beside: appends of other requests that the first pass computes too; `hidden` are their states (n, W).
    """

    def __init__(
        self, model: Backbone, appends: Sequence[Append], pad_id: int = 0, beside: Sequence[Append] = ()
    ) -> None:
        self.model, self.appends, self.pad_id, self.beside = model, appends, pad_id, beside
        self.hidden: list[Tensor] = []
        self.passes = 0
        self._start: Tensor | None = None

    @property
    def start(self) -> Tensor:
        if self._start is None:
            width = self.model.transformer.c.width
            self._append(self.model.token.embedding.weight.new_zeros(len(self.appends), 0, width), True)
        assert self._start is not None
        return self._start

    def __call__(self, inputs: Tensor, causal: bool = True, clean: int = 0) -> Tensor:
        if self._start is None and not clean:
            return self._append(inputs, causal)
        start = self.start.unsqueeze(1)
        self.passes += 1
        histories = [one.history for one in self.appends]
        runs = placeholder_runs(histories, inputs.shape[1], causal, clean)
        starts = starts_of(histories, inputs.device)
        return torch.cat([start, draft_pass(self.model, inputs, starts, runs, causal, clean)], 1)

    def target(self) -> CacheCall:
        return self

    def _append(self, inputs: Tensor, causal: bool) -> Tensor:
        """The first pass; (B, 1 + n, W), the start first."""
        self.passes += 1
        num, appends = len(self.appends), [*self.appends, *self.beside]
        hidden, behind = run_context(self.model, appends, self.pad_id, None, inputs, causal)
        self._start, self.hidden = torch.stack([one[-1] for one in hidden[:num]]), hidden[num:]
        return torch.cat([self._start.unsqueeze(1), behind], 1)


def starts_of(histories: Sequence[History], device: torch.device) -> Starts:
    """A block of tokens after each history, all in one batch row."""
    block, position = (
        torch.tensor([getattr(one, name) for one in histories], device=device)
        for name in ("next_block", "next_position")
    )
    zeros = torch.zeros_like(block)
    return Starts(zeros, zeros, zeros, block, position, len(histories))


class StateCall(DraftReads):
    """Hidden states (B, W) of an earlier pass, at the ends of B histories; placeholders go through the last layers
    alone."""

    def __init__(
        self, model: Backbone, start: Tensor, histories: Sequence[History], native: CompiledStep | None = None
    ) -> None:
        self.model, self.start, self.histories, self.native = model, start, histories, native
        self.passes = 0

    def __call__(self, inputs: Tensor, causal: bool = True, clean: int = 0) -> Tensor:
        if clean:
            raise ValueError("recurrent drafting reads no text: its ids are placeholders")
        self.passes += 1
        runs = placeholder_runs(self.histories, inputs.shape[1], causal)
        found = draft_pass(self.model, inputs, starts_of(self.histories, inputs.device), runs, causal, 0)
        return torch.cat([self.start.unsqueeze(1), found], 1)

    def target(self) -> StateCall:
        return self
