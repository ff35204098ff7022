"""The loss curve of a run as a PNG, drawn with Pillow:  python -m train.tools.curve RUN/metrics.jsonl OUT.png

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
from train.metrics import read_metrics

WIDTH, HEIGHT, MARGIN = 900, 260, 56


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average; the window shrinks at the ends."""
    half = window // 2
    parts = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [math.fsum(part) / len(part) for part in parts]


def draw_curve(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the picture. Raises ValueError when no row has a finite loss."""
    from PIL import Image, ImageDraw

    names = sorted({name for row in rows for name in row if name.startswith("loss/")})
    series = {name: _finite(rows, name) for name in names}
    series = {name: points for name, points in series.items() if len(points) > 1}
    if not series:
        raise ValueError("the metrics have no losses to draw; give the metrics.jsonl of a run of at least two steps")
    picture = Image.new("RGB", (WIDTH, HEIGHT * len(series)), "white")
    draw = ImageDraw.Draw(picture)
    for panel, (name, points) in enumerate(series.items()):
        _draw_panel(draw, HEIGHT * panel, name.removeprefix("loss/"), points)
    save_png(picture, path)


def _finite(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    values = [(int(row["step"]), row.get(name)) for row in rows]
    return [(step, float(v)) for step, v in values if isinstance(v, int | float) and math.isfinite(v) and v > 0]


def _draw_panel(draw: Any, top: int, name: str, points: Sequence[tuple[int, float]]) -> None:
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = math.log(min(values)), math.log(max(values))
    right, bottom = WIDTH - 16, top + HEIGHT - 32

    def at(step: int, value: float) -> tuple[float, float]:
        x = MARGIN + (right - MARGIN) * (step - steps[0]) / max(steps[-1] - steps[0], 1)
        return x, bottom - (bottom - top - 30) * (math.log(value) - low) / max(high - low, 1e-9)

    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = math.exp(low + share * (high - low))
        y = at(steps[0], value)[1]
        draw.line([(MARGIN, y), (right, y)], fill=(228, 228, 228))
        draw.text((6, y - 6), f"{value:.3g}", fill=(90, 90, 90))
        step = round(steps[0] + share * (steps[-1] - steps[0]))
        draw.text((at(step, values[0])[0] - 12, bottom + 6), str(step), fill=(90, 90, 90))
    draw.text((MARGIN, top + 8), f"{name}  (last: {values[-1]:.4g})", fill=(20, 20, 20))
    averages = smooth(values, max(3, len(values) // 50))
    draw.line([at(*point) for point in points], fill=(176, 200, 232))
    draw.line([at(step, value) for step, value in zip(steps, averages, strict=True)], fill=(24, 78, 160), width=2)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2:
        print(__doc__)
        return 2
    return exit_code(lambda: draw_curve(read_metrics(Path(arguments[0])), Path(arguments[1])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
