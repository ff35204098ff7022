"""A distribution of two words as a picture: one cell for every pair, dark where it is likely, red where impossible.

Legend: V words, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CELL, EDGE = 22, 58  # pixels: of a cell, and of the words beside and above the cells
LEVELS = 6  # of shade: few colours make small files
LEGAL, ILLEGAL, FRAME, PALE = (22, 78, 150), (205, 40, 40), (90, 90, 90), (228, 228, 228)


def pair_frequencies(ids: Tensor, vocab_size: int) -> Tensor:
    """(V, V) float64: shares of samples (B, 2); a sample with an id of V or above does not count."""
    inside = ids[(ids < vocab_size).all(-1)]
    counts = torch.bincount(inside[:, 0] * vocab_size + inside[:, 1], minlength=vocab_size**2)
    return counts.double().view(vocab_size, vocab_size) / len(ids)


def table_picture(probs: Tensor, legal: Tensor, words: Sequence[str]) -> Tensor:
    """uint8 (H, W, 3) of probabilities (V, V), first words down, second words across; `legal` (V, V) bool: pairs of the
    joint, with a frame. Shades have one scale for all pictures: full at 1 / (number of legal pairs)."""
    from PIL import Image, ImageDraw

    V = len(words)
    size = EDGE + V * CELL + 2
    picture = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(picture)
    shades = ((probs * int(legal.sum())).clamp(max=1).sqrt() * LEVELS).round() / LEVELS
    for i in range(V):
        _word(picture, draw, words[i], i)
        for j in range(V):
            x, y = EDGE + j * CELL, EDGE + i * CELL
            ink, shade = LEGAL if legal[i, j] else ILLEGAL, float(shades[i, j])
            fill = tuple(round(255 + (c - 255) * shade) for c in ink)
            draw.rectangle([x, y, x + CELL, y + CELL], fill=fill, outline=PALE)
    for i, j in legal.nonzero().tolist():
        x, y = EDGE + j * CELL, EDGE + i * CELL
        draw.rectangle([x, y, x + CELL, y + CELL], outline=FRAME, width=2)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size, size, 3).clone()


def _word(picture: Any, draw: Any, word: str, n: int) -> None:
    """Write a word beside row n and, rotated, above column n."""
    from PIL import Image, ImageDraw, ImageFont

    font, middle = ImageFont.load_default(12), EDGE + n * CELL + CELL // 2
    draw.text((EDGE - 5, middle), word, fill=(40, 40, 40), font=font, anchor="rm")
    strip = Image.new("RGB", (EDGE - 5, CELL), "white")
    ImageDraw.Draw(strip).text((2, CELL // 2), word, fill=(40, 40, 40), font=font, anchor="lm")
    picture.paste(strip.rotate(90, expand=True), (EDGE + n * CELL + 1, 0))
