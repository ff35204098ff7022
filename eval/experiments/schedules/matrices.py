"""Matrices of levels: one row per state, one column per block, from S (noise) to 0 (data)."""

from __future__ import annotations

import math

from eval.experiments.schedules.sampling import Levels


def staggered(num_blocks: int, steps: int, rows: float) -> Levels:
    """Block b starts floor(b rows) rows after block 0: clip(S + floor(b rows) - m, 0, S) in row m.

    rows = 0 is a full sequence, rows >= S is block-autoregressive, S / W is a rolling window of W blocks; at small
    numbers of rows it is the pyramid of Diffusion Forcing (arXiv 2407.01392).
    """
    delays = [math.floor(b * rows + 1e-9) for b in range(num_blocks)]
    return [tuple(min(max(steps + d - m, 0), steps) for d in delays) for m in range(steps + delays[-1] + 1)]


def level_major(num_blocks: int, steps: int) -> Levels:
    """All blocks go down one level, one after the other, before any goes down the next (arXiv 2103.15089)."""
    rows = [(steps,) * num_blocks]
    for level in range(steps - 1, -1, -1):
        rows += [(level,) * (b + 1) + (level + 1,) * (num_blocks - 1 - b) for b in range(num_blocks)]
    return rows
