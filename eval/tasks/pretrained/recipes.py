"""The example recipes on imported language models, at tiny size: losses of a short run, the equality contract after it,
and the text path of the published model."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pydantic import Field

from eval.experiments.imports.training import RECIPES_RUN, recipe_row
from eval.task import Context, Curve, Measure, Outcome, TaskOptions, task

ROWS = tuple(f"{name}_{row}" for name in RECIPES_RUN for row in ("start", "end", "fall", "contract"))


class RecipeOptions(TaskOptions):
    """steps: of each run. data: a parquet file with the columns image and caption; None: squares of one colour."""

    steps: int = Field(default=50, ge=10)
    data: str | None = None


@task("pretrained_recipes", RecipeOptions, rows=ROWS)
def pretrained_recipes(context: Context, options: RecipeOptions) -> Outcome:
    """start, end: the mean total loss of the first and the last five steps; fall: their difference. contract: the
    largest difference of the equality contract in float64."""
    measures, lines = [], {}
    for name in RECIPES_RUN:
        with tempfile.TemporaryDirectory() as folder:
            row = recipe_row(name, Path(folder), options.steps, options.data)
        note = f"{options.steps} steps of {RECIPES_RUN[name].recipe}.toml"
        values = {"start": row.start, "end": row.end, "fall": row.start - row.end}
        measures += [Measure(f"{name}_{key}", value, "nats", note) for key, value in values.items()]
        measures.append(Measure(f"{name}_contract", row.contract, "absolute", note))
        lines[name] = list(enumerate(row.losses))
    return Outcome(measures, curves=[Curve("Training on imported models", "step", "loss", lines)])
