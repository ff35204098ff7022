"""Choose the vocabulary and write `vocabulary.json`:  python -m omni.data.emoji_world.vocabulary [--font FILE]

The candidates are the fully qualified emoji of the `emoji` package without flags of places, skin-tone variants and
mirrored "facing right" variants, if the font renders them as one glyph. Nearly equal pictures are dropped: in order of
sequence length, then name, an emoji is dropped if its 32-pixel picture on white differs from an accepted one by less
than MIN_DISTANCE (root mean square over pixels and channels, of 255). Run it to change the vocabulary; the bundled
model was trained on the committed file.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from omni.data.emoji_world.atlas import VOCABULARY_FILE, Glyphs
from omni.data.emoji_world.classes import CLASSES
from omni.data.emoji_world.names import TONE_CHARACTERS, TONES, candidates, package_name
from omni.data.emoji_world.objects import ROW_NAMES, SCENE_NAMES, TONE_BASES

MIN_DISTANCE = 25.0
# Languages whose names are stored; others need the `emoji` package.
LANGUAGES = ("es", "fr", "de", "it", "pt", "ja", "ko", "zh", "ru", "id", "tr")


def picture_on_white(glyphs: Glyphs, character: str) -> np.ndarray | None:
    """The 32-pixel picture on white, float32 (32*32*3,), or None if the font has no single glyph."""
    from PIL import Image

    picture = glyphs.picture(character)
    if picture is None:
        return None
    rgba = np.asarray(picture.resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float32)
    alpha = rgba[..., 3:] / 255
    return (rgba[..., :3] * alpha + 255 * (1 - alpha)).reshape(-1)


def distinct_names(glyphs: Glyphs, names: dict[str, str]) -> dict[str, str]:
    """The names whose pictures differ from every earlier picture, in alphabetical order."""
    kept: dict[str, str] = {}
    pictures = np.empty((len(names), 32 * 32 * 3), dtype=np.float32)
    for name, character in names.items():
        picture = picture_on_white(glyphs, character)
        if picture is None:
            continue
        distance = np.sqrt(((pictures[: len(kept)] - picture) ** 2).mean(1))
        if not len(kept) or distance.min() >= MIN_DISTANCE:
            pictures[len(kept)] = picture
            kept[name] = character
    return dict(sorted(kept.items()))


def with_tone(character: str, tone: str) -> str:
    """The character with the skin-tone modifier after its first code point."""
    return character[0] + TONE_CHARACTERS[tone] + character[1:].removeprefix("\ufe0f")


def build_vocabulary(font_path: str | None = None) -> dict[str, object]:
    """The content of vocabulary.json. ValueError if the documents use a name that was dropped."""
    names = distinct_names(Glyphs(font_path), candidates())
    used = {*SCENE_NAMES, *ROW_NAMES, *TONE_BASES, *(member for members in CLASSES.values() for member in members)}
    missing = sorted(used - set(names))
    if missing:
        raise ValueError(f"names used by the documents are not in the vocabulary: {missing}; change them")
    return {
        "names": names,
        "tones": {base: {tone: with_tone(names[base], tone) for tone in TONES} for base in TONE_BASES},
        "translations": {
            language: {name: package_name(names[name], language) for name in sorted(SCENE_NAMES)}
            for language in LANGUAGES
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Choose the emoji vocabulary and write vocabulary.json.")
    parser.add_argument("--font", help="colour emoji font file")
    data = build_vocabulary(parser.parse_args().font)
    VOCABULARY_FILE.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{VOCABULARY_FILE}: {len(data['names'])} names")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
