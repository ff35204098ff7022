"""The loss of the averaged weights on held-out documents, with the same noise every time.

No condition is dropped, and the last picture stays in the context. Documents that are too long are split as in
training. Objectives with a schedule get a training progress of 1, so all values are comparable. Changes nothing in the
run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from omni.rng import Key
from train.data.batch import Packed
from train.data.loader import Loader
from train.loop import Run, mean_of, unweighted


class Validation:
    """`loader`: of the held-out documents, with an end. They are read and encoded once."""

    def __init__(self, loader: Loader, key: Key) -> None:
        self.loader, self.key = loader, key
        self._steps: Sequence[Packed] | None = None

    def __call__(self, run: Run) -> dict[str, float]:
        """`loss`, `loss/NAME` of each objective, and `unweighted/NAME` where it differs (Terms.raw)."""
        if self._steps is None:
            self._steps = _all_steps(self.loader)
        recipe, (averages, scores) = run.recipe, run.networks
        run.model.eval()
        try:
            with (
                run.ema.applied(),
                torch.no_grad(),
                torch.autocast(recipe.device.split(":")[0], torch.bfloat16, enabled=recipe.autocasts),
            ):
                batches = (batch.to(recipe.device) for step in self._steps for batch in step.batches)
                parts = [run.model(batch, run.objectives, self.key, averages, 1.0, scores) for batch in batches]
        finally:
            run.model.train()
        means = {name: float(mean_of([part[name] for part in parts])) for name in parts[0]}
        total = sum(parts[0][name].weight * mean for name, mean in means.items())
        return {"loss": total} | {f"loss/{name}": mean for name, mean in means.items()} | unweighted(parts)


def _all_steps(loader: Loader) -> list[Packed]:
    """All steps of a loader with an end. ValueError if they have no document."""
    steps, cursor = [], 0
    assert loader.end is not None
    while cursor != loader.end:
        steps.append(loader.next(cursor))
        cursor = steps[-1].cursor
    if not any(step.documents for step in steps):
        raise ValueError("no held-out document fits a batch row; raise batch.shapes, or give other documents")
    return steps
