"""A frozen text path beside each set of weights for latents: its logits after training on pictures."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pydantic import Field

from eval.experiments.imports.training import WEIGHT_SETS, frozen_rows
from eval.task import Context, Measure, Outcome, TaskOptions, task


class FrozenOptions(TaskOptions):
    """steps: of training. data: a parquet file with the columns image and caption; None: squares of one colour."""

    steps: int = Field(default=20, ge=5)
    data: str | None = None


@task("pretrained_frozen", FrozenOptions, rows=(*WEIGHT_SETS, "falling"))
def pretrained_frozen(context: Context, options: FrozenOptions) -> Outcome:
    """Entries of the text logits (float32) that differ after the steps, in percent, for each set of weights; "lora":
    with its LoRA off. falling: how many of the losses fell."""
    with tempfile.TemporaryDirectory() as folder:
        rows = frozen_rows(Path(folder), options.steps, options.data)
    falling = sum(fall > 0 for _, fall in rows.values())
    note = f"{options.steps} steps"
    measures = [Measure(name, differ, "%", note) for name, (differ, _) in rows.items()]
    return Outcome([*measures, Measure("falling", falling, f"of {len(rows)}", note)])
