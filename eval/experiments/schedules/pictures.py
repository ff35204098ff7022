"""Schedules as a picture: matrices of levels above, errors over steps and lost covariance over lags below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eval.experiments.schedules.sampling import Levels
from train.charts import COLOURS, new_figure, require_matplotlib, to_picture

if TYPE_CHECKING:
    from PIL import Image

Line = Sequence[tuple[float, float]]


def schedule_picture(
    matrices: Mapping[str, Levels], errors: Mapping[str, Line], lost: Mapping[str, Line]
) -> Image.Image:
    """A figure of 1100 x 620 pixels.

    matrices: by title; passes go down, blocks across, dark is noise. errors: by name, the error over S, on logarithmic
    axes. lost: by name, the share of a covariance that is lost over the lag.
    """
    figure = new_figure(1100, 620)
    with require_matplotlib().rc_context({"text.parse_math": False}):
        halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.3))
        above, below = halves
        row = above.subplots(1, len(matrices), squeeze=False)[0]
        for axes, (title, levels) in zip(row, matrices.items(), strict=True):
            _matrix(axes, title, levels)
        left, right = below.subplots(1, 2)
        _lines(left, errors, "steps S of a block", "largest error of the covariance", log=True)
        _lines(right, lost, "lag between neighbours, in units of S", "share of a covariance lost")
    return to_picture(figure)


def _matrix(axes: Any, title: str, levels: Levels) -> None:
    """Levels as shades."""
    axes.imshow([list(row) for row in levels], cmap="Blues", aspect="auto", interpolation="nearest")
    axes.set(title=f"{title}: {len(levels) - 1} passes", xlabel="block", ylabel="row")
    axes.title.set_fontsize(9)
    axes.set_xticks(range(len(levels[0])))
    axes.yaxis.get_major_locator().set_params(integer=True)


def _lines(axes: Any, lines: Mapping[str, Line], x_label: str, y_label: str, log: bool = False) -> None:
    """Named lines; every second one is dashed, so that equal ones can be told apart."""
    for number, (name, line) in enumerate(lines.items()):
        xs, ys = [x for x, _ in line], [y for _, y in line]
        axes.plot(xs, ys, color=COLOURS[number], linestyle="--" if number % 2 else "-", linewidth=1.7, label=name)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(color="#e2e2e2", linewidth=0.7)
    axes.legend(fontsize=8, frameon=False)
    if log:
        ticks = sorted({x for line in lines.values() for x, _ in line})
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.set_xticks([], minor=True)
