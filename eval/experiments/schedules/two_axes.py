"""The two axes of generation on Gaussian data: how much a schedule spends along the sequence, and how much along
refinement.

    schedule_axes   KL of the output for every number of steps S and every lag between blocks, exactly

Report rows. READS is "all" or "before", LAG the delay of a block behind its predecessor in percent of its S steps: at 0
all blocks move together, at 100 one after another.

    axes_READS_lag_LAG_S     KL of the output against the truth, nats; Euler steps
    passes_lag_LAG_S         refine passes: S + floor((B - 1) lag S)
    best_READS_BUDGET        the smallest KL of all cells with at most BUDGET passes
    best_lag_READS_BUDGET    and its lag, in percent
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from eval.experiments.schedules.gaussian import BlockGaussian
from eval.experiments.schedules.sampling import output_covariance
from eval.task import Context, Measure, Outcome, Panel, TaskOptions, task
from omni.media import load_image, save_png
from omni.sequence.schedule import Reads, Schedule, staggered
from train.charts import new_figure, require_matplotlib, to_picture

READS: tuple[Reads, ...] = ("all", "before")
TITLES = {"all": "every block reads all blocks", "before": "causal: a block reads noisy blocks before it"}

Cells = dict[tuple[str, float, int], float]  # (reads, lag, S) -> KL


class AxesOptions(TaskOptions):
    """blocks, correlation: the data. steps: numbers S. lags: delays over S. budgets: of passes. folder: of the output
    picture."""

    blocks: int = Field(default=8, ge=2, le=16)
    correlation: float = Field(default=0.8, gt=-1, lt=1)
    steps: tuple[int, ...] = Field(default=(4, 8, 16, 32, 64), min_length=1)
    lags: tuple[float, ...] = Field(default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1)
    budgets: tuple[int, ...] = (16, 32, 64, 128, 256)
    folder: str = "runs/eval"

    @model_validator(mode="after")
    def _check(self) -> AxesOptions:
        for lag in self.lags:
            if not 0 <= lag <= 1 or any(lag * S % 1 for S in self.steps):
                raise ValueError(
                    f"lag {lag}: a lag is in [0, 1], and lag times S a whole number for each of {self.steps}"
                )
        fewest = self.schedule("all", min(self.lags), min(self.steps)).num_passes
        if self.budgets and min(self.budgets) < fewest:
            raise ValueError(f"a budget of {min(self.budgets)} passes allows no cell; give at least {fewest}")
        return self

    def schedule(self, reads: Reads, lag: float, S: int) -> Schedule:
        """The schedule of a cell."""
        return staggered(self.blocks, S, lag * S, reads)


def lag_name(lag: float) -> str:
    """The part of a row's name."""
    return f"lag_{100 * lag:g}".replace(".", "_")


def axes_rows(options: AxesOptions) -> list[str]:
    """All report rows."""
    cells = [f"{lag_name(lag)}_{S}" for lag in options.lags for S in options.steps]
    rows = [f"passes_{cell}" for cell in cells] + [f"axes_{reads}_{cell}" for reads in READS for cell in cells]
    return rows + [f"{kind}_{reads}_{n}" for kind in ("best", "best_lag") for reads in READS for n in options.budgets]


@task("schedule_axes", AxesOptions, rows=axes_rows)
def schedule_axes(context: Context, options: AxesOptions) -> Outcome:
    """KL over the number of steps and the lag between blocks, and the best of both for a budget of passes."""
    require_matplotlib()
    cells = divergences(options)
    measures = [
        Measure(f"passes_{lag_name(lag)}_{S}", options.schedule("all", lag, S).num_passes, "passes")
        for lag in options.lags for S in options.steps
    ]  # fmt: skip
    measures += [Measure(f"axes_{reads}_{lag_name(lag)}_{S}", kl, "nats") for (reads, lag, S), kl in cells.items()]
    found = {(reads, n): best(options, cells, reads, n) for reads in READS for n in options.budgets}
    measures += [Measure(f"best_{reads}_{n}", kl, "nats") for (reads, n), (kl, _) in found.items()]
    measures += [Measure(f"best_lag_{reads}_{n}", 100 * lag, "%") for (reads, n), (_, lag) in found.items()]
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    picture = draw(options, cells)
    save_png(picture, folder / "schedule_axes.png")
    return Outcome(measures, [Panel("schedule_axes.png", answer=(load_image(picture),))])


def divergences(options: AxesOptions) -> Cells:
    """KL of every cell; Euler steps of exact velocities."""
    gaussian = BlockGaussian(options.blocks, options.correlation)
    return {
        (reads, lag, S): gaussian.divergence(output_covariance(gaussian, options.schedule(reads, lag, S), "euler"))
        for reads in READS for lag in options.lags for S in options.steps
    }  # fmt: skip


def best(options: AxesOptions, cells: Cells, reads: str, budget: int) -> tuple[float, float]:
    """The smallest KL of all cells with at most `budget` passes, and its lag."""
    allowed = [
        (kl, lag) for (found, lag, S), kl in cells.items()
        if found == reads and options.schedule("all", lag, S).num_passes <= budget
    ]  # fmt: skip
    return min(allowed)


def draw(options: AxesOptions, cells: Cells) -> Any:
    """Two maps of KL, steps across and lag down; the number in a cell is its passes."""
    figure = new_figure(1000, 380)
    for number, reads in enumerate(READS):
        axes: Any = figure.add_subplot(1, 2, number + 1)
        table = [[math.log10(cells[reads, lag, S]) for S in options.steps] for lag in options.lags]
        shown = axes.imshow(table, cmap="viridis_r", aspect="auto", vmin=-3, vmax=0.5)
        for row, lag in enumerate(options.lags):
            for column, S in enumerate(options.steps):
                text = str(options.schedule("all", lag, S).num_passes)
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white")
        axes.set_xticks(range(len(options.steps)), [str(S) for S in options.steps])
        axes.set_yticks(range(len(options.lags)), [f"{100 * lag:g} %" for lag in options.lags])
        axes.set(title=TITLES[reads], xlabel="steps of a block", ylabel="lag between blocks")
        axes.title.set_fontsize(10)
        figure.colorbar(shown, ax=axes, label="log10 of KL, nats")
    return to_picture(figure)
