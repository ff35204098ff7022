"""The loss curve of a run as a PNG, drawn by matplotlib:  python -m train.tools.curve RUN/metrics.jsonl OUT.png

One panel per loss, over steps; thin: every step, thick: a moving average. The vertical axis is logarithmic.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omni.cli.arguments import exit_code
from omni.media import save_png
from train.charts import new_figure, plain_numbers, to_picture
from train.metrics import read_metrics

WIDTH, HEIGHT = 900, 260  # pixels of a panel


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average; the window shrinks at the ends."""
    half = window // 2
    parts = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [math.fsum(part) / len(part) for part in parts]


def draw_curve(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the picture. Raises ValueError when no row has a finite loss."""
    names = sorted({name for row in rows for name in row if name.startswith("loss/")})
    series = {name: _positive_points(rows, name) for name in names}
    series = {name: points for name, points in series.items() if len(points) > 1}
    if not series:
        raise ValueError("the metrics have no losses to draw; give the metrics.jsonl of a run of at least two steps")
    figure = new_figure(WIDTH, HEIGHT * len(series))
    for axes, (name, points) in zip(figure.subplots(len(series), squeeze=False)[:, 0], series.items(), strict=True):
        _draw_panel(axes, name.removeprefix("loss/"), points)
    save_png(to_picture(figure), path)


def _positive_points(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of the rows whose value is finite and above 0."""
    values = [(int(row["step"]), row.get(name)) for row in rows]
    return [(step, float(v)) for step, v in values if isinstance(v, int | float) and math.isfinite(v) and v > 0]


def _draw_panel(axes: Any, name: str, points: Sequence[tuple[int, float]]) -> None:
    """One loss: every step thin, its moving average thick."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    axes.plot(steps, values, color="#b0c8e8", linewidth=0.8)
    axes.plot(steps, smooth(values, max(3, len(values) // 50)), color="#184ea0", linewidth=1.6)
    axes.set_title(f"{name}  (last: {values[-1]:.4g})", loc="left", fontsize=10)
    axes.set(yscale="log", xlim=(steps[0], max(steps[-1], steps[0] + 1)))
    axes.grid(color="#e4e4e4", linewidth=0.7)
    plain_numbers(axes.yaxis)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2:
        print(__doc__)
        return 2
    return exit_code(lambda: draw_curve(read_metrics(Path(arguments[0])), Path(arguments[1])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
