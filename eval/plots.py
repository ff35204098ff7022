"""Charts, clouds of points and grids of pictures: for files that a README shows.

Pictures of clouds are uint8 (H, W, 3) tensors, whole figures are Pillow images of few colours, so that files are small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from train.charts import charts, to_picture

if TYPE_CHECKING:
    from PIL import Image

    from train.charts import Line

INK, PALE = (40, 40, 40), (226, 226, 226)
PANEL = (470, 400)  # pixels of a chart


def log_charts(panels: Mapping[str, Mapping[str, Line]], x_label: str, y_label: str) -> Image.Image:
    """Panels of named lines side by side, both axes logarithmic (see train.charts.charts)."""
    return to_picture(charts(panels, x_label, y_label, PANEL, log=True))


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
    """Pillow's own font."""
    from PIL import ImageFont

    return ImageFont.load_default(size)
