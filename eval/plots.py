"""Charts and clouds of points as pictures, drawn with Pillow: for files that a README shows.

Pictures of clouds are uint8 (H, W, 3) tensors, whole figures are Pillow images of few colours, so that files are small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

    Line = Sequence[tuple[float, float]]

COLOURS = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#bcbd22", "#000000",
    "#7f7f7f", "#0b3d91", "#b8860b", "#006d5b", "#c71585", "#5f9ea0",
)  # fmt: skip
INK, PALE = (40, 40, 40), (226, 226, 226)
PANEL_WIDTH, PANEL_HEIGHT, MARGIN, LEGEND_WIDTH = 470, 400, 52, 210


def log_charts(panels: Mapping[str, Mapping[str, Line]], x_label: str, y_label: str) -> Image.Image:
    """Panels of named lines side by side, both axes logarithmic, one legend; a name has one colour in all panels.

    Every x gets a tick. Points that are not finite and positive are left out.
    """
    from PIL import Image, ImageDraw

    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    height = max(PANEL_HEIGHT, 30 + 22 * len(names))
    picture = Image.new("RGB", (PANEL_WIDTH * len(panels) + LEGEND_WIDTH, height), "white")
    draw = ImageDraw.Draw(picture)
    for index, (title, lines) in enumerate(panels.items()):
        _panel(draw, index * PANEL_WIDTH, title, lines, names, x_label, y_label)
    for index, name in enumerate(names):
        x, y = PANEL_WIDTH * len(panels) + 6, 30 + 22 * index
        _line(draw, [(x, y), (x + 26, y)], index)
        draw.text((x + 34, y - 8), name, fill=INK, font=_font(13))
    return small_palette(picture, 64)


def _panel(
    draw: Any, left: int, title: str, lines: Mapping[str, Line], names: Sequence[str], x_label: str, y_label: str
) -> None:
    kept = {n: [(x, y) for x, y in line if x > 0 and y > 0 and math.isfinite(y)] for n, line in lines.items()}
    points = [point for line in kept.values() for point in line] or [(1.0, 1.0)]
    (x_low, x_high), (y_low, y_high) = (
        (math.log(min(values)), math.log(max(values))) for values in zip(*points, strict=True)
    )

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - x_low) / ((x_high - x_low) or 1.0)
        up = (math.log(y) - y_low) / ((y_high - y_low) or 1.0)
        right, bottom = left + PANEL_WIDTH - 18, PANEL_HEIGHT - MARGIN
        return left + MARGIN + across * (right - left - MARGIN), bottom - up * (bottom - 34)

    draw.text((left + MARGIN, 8), title, fill=INK, font=_font(15))
    for y in _ticks(math.exp(y_low), math.exp(y_high)):
        start, end = at(math.exp(x_low), y), at(math.exp(x_high), y)
        draw.line([start, end], fill=PALE)
        draw.text((left + 8, start[1] - 8), f"{y:g}", fill=INK, font=_font(12))
    for x in sorted({x for x, _ in points}):
        place = at(x, math.exp(y_low))
        draw.line([at(x, math.exp(y_high)), place], fill=PALE)
        draw.text((place[0], place[1] + 6), f"{x:g}", fill=INK, font=_font(12), anchor="ma")
    draw.text((left + (PANEL_WIDTH + MARGIN) / 2, PANEL_HEIGHT - 22), x_label, fill=INK, font=_font(13), anchor="ma")
    draw.text((left + PANEL_WIDTH - 18, 10), y_label, fill=INK, font=_font(12), anchor="ra")
    for name, line in kept.items():
        _line(draw, [at(x, y) for x, y in line], names.index(name))


def _line(draw: Any, places: Sequence[tuple[float, float]], index: int) -> None:
    """A line with its points marked; past the tenth colour squares mark them, before it circles."""
    colour = COLOURS[index % len(COLOURS)]
    draw.line(places, fill=colour, width=2)
    mark = draw.ellipse if index < 10 else draw.rectangle
    for x, y in places:
        mark([x - 3, y - 3, x + 3, y + 3], fill=colour)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high]."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = (digit * 10.0**power for power in powers for digit in (1, 2, 5))
    return [value for value in values if low <= value <= high]


def cloud(points_N2: Tensor, size: int = 112, reach: float = 2.4, levels: int = 12) -> Tensor:
    """uint8 (size, size, 3): how many points fall into each pixel of [-reach, reach]^2, dark where many do."""
    bins = ((points_N2.float() + reach) / (2 * reach) * size).floor()
    inside = bins[((bins >= 0) & (bins < size)).all(-1)].long()
    flat = torch.bincount(inside[:, 1] * size + inside[:, 0], minlength=size * size).view(size, size).flip(0)
    full = 16 * len(points_N2) / size**2  # as if all points lay in a sixteenth of the square
    ink = ((flat / max(full, 1e-9)).clamp(max=1).sqrt() * levels).round() / levels
    return (255 - ink[..., None] * torch.tensor([225.0, 175.0, 95.0])).round().to(torch.uint8)


def grid(rows: Sequence[Sequence[tuple[str, Tensor]]], gap: int = 6) -> Image.Image:
    """Labelled pictures of one size in rows."""
    from PIL import Image, ImageDraw

    from omni.media import to_pil

    height, width, _ = rows[0][0][1].shape
    label = 32
    across = max(len(row) for row in rows)
    picture = Image.new("RGB", (across * (width + gap) + gap, len(rows) * (height + label + gap) + gap), "white")
    draw = ImageDraw.Draw(picture)
    for i, row in enumerate(rows):
        for j, (name, pixels) in enumerate(row):
            x, y = gap + j * (width + gap), gap + i * (height + label + gap)
            draw.multiline_text((x, y), _two_lines(name), fill=INK, font=_font(12), spacing=1)
            picture.paste(to_pil(pixels), (x, y + label))
            draw.rectangle([x, y + label, x + width - 1, y + label + height - 1], outline=PALE)
    return small_palette(picture, 32)


def _two_lines(name: str) -> str:
    """Words instead of underscores, the last of them on a line of its own where there are several."""
    words = name.split("_")
    return "\n".join([" ".join(words[:-1]), words[-1]] if len(words) > 1 else [name])


def small_palette(picture: Image.Image, colours: int) -> Image.Image:
    """The same picture in a palette: a third of the file."""
    from PIL import Image

    return picture.quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
