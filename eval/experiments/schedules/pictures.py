"""Schedules as a picture: matrices of levels above, divergence over passes and lost covariance over lags below."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from omni.sequence.schedule import Schedule, level_major, masked_order, staggered
from train.charts import COLOURS, new_figure, require_matplotlib, to_picture

if TYPE_CHECKING:
    from PIL import Image

Lines = Mapping[str, Sequence[tuple[float, float]]]

BLOCKS, LEVELS = 4, 6
MATRICES = {
    "block-autoregressive": staggered(BLOCKS, LEVELS, LEVELS),
    "rolling, window 2": staggered(BLOCKS, LEVELS, Fraction(LEVELS, 2)),
    "pyramid": staggered(BLOCKS, LEVELS, 1),
    "full sequence": staggered(BLOCKS, LEVELS, 0),
    "level-major": level_major(BLOCKS, LEVELS),
    "masked order, 6 rounds": masked_order(12, 6, (7, 2, 10, 5, 0, 11, 4, 8, 1, 6, 3, 9)),
}
TITLES = {"euler": "Euler steps", "flow_map": "exact flow maps, each with a fixed context"}
EXACT = 1e-12  # a KL below it is rounding


def draw(divergences: Mapping[str, Lines], lost: Lines) -> Image.Image:
    """A figure of 1200 x 620 pixels.

    divergences: by step and schedule, KL over passes, on logarithmic axes; points of exact schedules are left out.
    lost: by name, the share of a covariance that is lost over the lag.
    """
    figure = new_figure(1200, 620)
    names = list(dict.fromkeys(name for lines in divergences.values() for name in lines))
    colours = dict(zip(names, COLOURS[:6] + COLOURS[9:13:3], strict=False))
    with require_matplotlib().rc_context({"text.parse_math": False}):
        halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.3))
        row = halves[0].subplots(1, len(MATRICES), squeeze=False)[0]
        for axes, (title, schedule) in zip(row, MATRICES.items(), strict=True):
            _matrix(axes, title, schedule)
        panels = halves[1].subplots(1, len(divergences) + 1, squeeze=False)[0]
        for axes, (step, lines) in zip(panels, divergences.items(), strict=False):
            _lines(axes, lines, colours, EXACT)
            axes.set(title=TITLES.get(step, step), xlabel="passes", ylabel="KL, nats", xscale="log", yscale="log")
        _lines(panels[-1], lost, dict(zip(lost, COLOURS[10:], strict=False)))
        panels[-1].set(title="2 blocks, causal, infinitely many steps", xlabel="lag between the blocks, over S",
                       ylabel="share of the covariance lost")  # fmt: skip
    return to_picture(figure)


def _matrix(axes: Any, title: str, schedule: Schedule) -> None:
    """Levels as shades: passes go down, blocks across, dark is noise."""
    axes.imshow([list(row) for row in schedule.levels], cmap="Blues", aspect="auto", interpolation="nearest")
    axes.set_title(f"{title}\n{schedule.num_passes} passes", fontsize=9)
    axes.set(xlabel="block" if schedule.num_levels > 1 else "token")
    axes.set_xticks(range(0, schedule.num_blocks, 1 if schedule.num_blocks < 9 else 3))
    axes.yaxis.get_major_locator().set_params(integer=True)


def _lines(axes: Any, lines: Lines, colours: Mapping[str, str], lowest: float = -1.0) -> None:
    """Named lines, causal ones dashed; points that are not finite, or not above `lowest`, are left out."""
    for name, line in lines.items():
        shown = [(x, y) for x, y in line if math.isfinite(y) and y > lowest]
        style = {
            "color": colours[name],
            "linestyle": "--" if name.startswith("causal") else "-",
            "label": name.replace("_", " "),
        }
        axes.plot([x for x, _ in shown], [y for _, y in shown], marker="o", markersize=3, **style)
    axes.grid(color="#e2e2e2", linewidth=0.7)
    axes.legend(fontsize=7, frameon=False)
    axes.title.set_fontsize(9)
