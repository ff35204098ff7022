"""Placeholders of joint tokens in the same pass that appends the context before them.

Legend: P placeholders of all requests of a pass, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from omni.nn.lora import Gated
from omni.nn.runs import Runs


@dataclass(frozen=True)
class Tail:
    """Placeholders after the positions that a pass appends: they attend to them in that pass and are not committed.

    inputs (1, P, W): they pass through the last layers only, one layer for each of `adapters`, whose gate is 0 at
    appended positions. position: (1, P, 3) int64. runs: of the appended positions, then of the placeholders.
    """

    inputs: Tensor
    position: Tensor
    adapters: Sequence[Gated | None]
    runs: Runs
