"""Atlas: emoji names and their pictures (sprites). Pillow renders them from a colour emoji font.

The names are in `vocabulary.json`, so they do not depend on the installed `emoji` package or font; `vocabulary.py`
chooses them. Shapes: S sprite side in pixels; a sprite is uint8 (S, S, 4), RGBA with straight (not premultiplied)
alpha. `scene.py` composes scenes.
"""

from __future__ import annotations

import difflib
import json
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from omni.data.emoji_world.font import WAY_OUT, find_font
from omni.data.emoji_world.names import TONES, package_name, tone_name

if TYPE_CHECKING:
    from PIL import Image as PillowImage
    from PIL import ImageFont

VOCABULARY_FILE = Path(__file__).with_name("vocabulary.json")
# Sizes in pixels that bitmap fonts have: Noto 109, Apple 160. Outline fonts take any.
BITMAP_SIZES = (109, 160, 137, 128, 96)


@cache
def vocabulary() -> dict[str, Any]:
    """The committed vocabulary: {"names": {name: character}, "tones": {base: {tone: character}}, "translations"}."""
    return json.loads(VOCABULARY_FILE.read_text(encoding="utf-8"))


class Glyphs:
    """Renders single emoji characters of one font file. Raises ValueError if the font is not usable."""

    def __init__(self, font_path: str | os.PathLike[str] | None = None) -> None:
        self.path = find_font(font_path)
        self.font = self._open()
        smile, apple = self.picture("\U0001f600"), self.picture("\U0001f34e")
        if smile is None or apple is None or smile.tobytes() == apple.tobytes():
            raise ValueError(f"the font {str(self.path)!r} has no emoji pictures; {WAY_OUT}")
        if not any(_has_colours(picture) for picture in (smile, apple)):
            raise ValueError(f"the font {str(self.path)!r} has emoji without colours; {WAY_OUT}")

    def _open(self) -> ImageFont.FreeTypeFont:
        """The font at the first size that it has."""
        from PIL import ImageFont

        for size in BITMAP_SIZES:
            try:
                return ImageFont.truetype(str(self.path), size)
            except OSError:
                continue  # a bitmap font has only its own strikes
        raise ValueError(f"{str(self.path)!r} is not a font that Pillow can open; {WAY_OUT}")

    def picture(self, character: str) -> PillowImage.Image | None:
        """The character cropped to its content, centred in a transparent square; None if the font lacks it."""
        from PIL import Image, ImageDraw

        width = self.font.getlength("\U0001f600")
        if self.font.getlength(character) > 1.5 * width:  # an unknown joined sequence gives several glyphs
            return None
        side = 2 * int(max(width, self.font.size))
        canvas = Image.new("RGBA", (side, side))
        ImageDraw.Draw(canvas).text((side // 4, side // 4), character, font=self.font, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            return None
        content = canvas.crop(box)
        side = max(content.size)
        square = Image.new("RGBA", (side, side))
        square.paste(content, ((square.width - content.width) // 2, (square.height - content.height) // 2))
        return square


def _has_colours(picture: PillowImage.Image) -> bool:
    """Whether any visible pixel of an RGBA picture is not grey."""
    pixels = np.asarray(picture).astype(np.int16)
    colours = pixels[pixels[..., 3] > 0, :3]
    return bool((colours.max(-1) - colours.min(-1) > 16).any()) if len(colours) else False


class Atlas:
    """The emoji vocabulary and its sprites, rendered on first use and cached in memory.

    names: vocabulary, in a fixed order (alphabetical). tones: names of person and hand emoji with a skin tone,
    "waving hand: dark skin tone". Every method raises ValueError on an unknown name and suggests the nearest.

    Example:
        >>> Atlas().sprite("red apple", 60).shape
        torch.Size([60, 60, 4])
    """

    def __init__(self, font_path: str | os.PathLike[str] | None = None) -> None:
        data = vocabulary()
        self._characters: dict[str, str] = dict(data["names"])
        self.names: tuple[str, ...] = tuple(self._characters)
        self.tone_bases: tuple[str, ...] = tuple(data["tones"])
        for base, tones in data["tones"].items():
            self._characters.update({tone_name(base, tone): tones[tone] for tone in TONES})
        self.tones: tuple[str, ...] = tuple(tone_name(base, tone) for base in self.tone_bases for tone in TONES)
        self._translations: dict[str, dict[str, str]] = data["translations"]
        self._glyphs = Glyphs(font_path)
        self._pictures: dict[str, PillowImage.Image] = {}
        self._sprites: dict[tuple[str, int], np.ndarray] = {}

    @property
    def font_path(self) -> Path:
        return self._glyphs.path

    def char(self, name: str) -> str:
        """The Unicode characters of a name or of a tone name."""
        character = self._characters.get(name)
        if character is None:
            near = difflib.get_close_matches(name, self._characters, n=1)
            raise ValueError(f"unknown emoji {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return character

    def name_in(self, name: str, language: str) -> str:
        """The name in another language (en, es, fr, de, it, pt, ja, ko, zh, ru, id, tr, ar, fa).

        The names in documents are stored; others need the `emoji` package.
        """
        character = self.char(name)
        if language == "en":
            return name
        stored = self._translations.get(language, {}).get(name)
        if stored is not None:
            return stored
        return package_name(character, language)

    def sprite_array(self, name: str, size: int) -> np.ndarray:
        """uint8 (size, size, 4), straight alpha; this is the cached array, do not write into it."""
        sprite = self._sprites.get((name, size))
        if sprite is None:
            if size < 1:
                raise ValueError(f"sprite size must be at least 1 pixel, got {size}")
            from PIL import Image

            # Pillow premultiplies RGBA before it filters, so transparent pixels do not bleed into the edge.
            picture = self._picture(name).resize((size, size), Image.Resampling.LANCZOS)
            sprite = self._sprites[name, size] = np.array(picture)
        return sprite

    def sprite(self, name: str, size: int) -> torch.Tensor:
        """The picture of `name`: uint8 (size, size, 4), RGBA, straight alpha, a fresh tensor."""
        return torch.from_numpy(self.sprite_array(name, size).copy())

    def _picture(self, name: str) -> PillowImage.Image:
        """The rendered character, cropped and square; cached. ValueError if the font lacks it."""
        picture = self._pictures.get(name)
        if picture is None:
            drawn = self._glyphs.picture(self.char(name))
            if drawn is None:
                raise ValueError(f"the font {str(self.font_path)!r} has no picture of {name!r}; {WAY_OUT}")
            picture = self._pictures[name] = drawn
        return picture
