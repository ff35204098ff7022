"""Scene: emoji at positions on a plain background, as hashable data; `render` renders it. Also keyed random scenes.

Shapes: pictures are uint8 (64, 64, 3), RGB. Positions and sizes are pixels; (x, y) is a sprite's top left corner.
Sprites are on 16-pixel cells with a margin of one or two pixels, so a codec of stride 16 has few distinct crops.
Blending is integer arithmetic: equal bits on every machine with the same font. Positions are whole pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from omni.data.emoji_world.atlas import Atlas
from omni.data.emoji_world.objects import ROW_NAMES, SCENE_NAMES
from omni.rng import Key

SIDE = 64
# Sides of sprites; then their top left corners, (x, y).
BIG, SMALL, ROW = 60, 30, 20
BIG_AT = (2, 2)
CENTRE = (17, 17)
LEFT, RIGHT, TOP, BOTTOM = (1, 17), (33, 17), (17, 1), (17, 33)
CORNERS = ((1, 1), (33, 1), (1, 33), (33, 33))
COUNT_SLOTS = {2: (LEFT, RIGHT), 3: (TOP, CORNERS[2], CORNERS[3]), 4: CORNERS}
ROW_SLOTS = ((1, 22), (22, 22), (43, 22))
PAIR_SLOTS = ((LEFT, RIGHT), (TOP, BOTTOM))
PLACES: Mapping[str, tuple[int, int]] = {"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM, "center": CENTRE}
# Corners of small sprites, and ordered pairs of them that do not overlap.
GRID = tuple((x, y) for y in (1, 17, 33) for x in (1, 17, 33))
APART = tuple((a, b) for a in GRID for b in GRID if abs(a[0] - b[0]) >= 32 or abs(a[1] - b[1]) >= 32)

# The first is white; the others are chosen by index: never reorder.
BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "yellow": (255, 243, 170),
    "pink": (255, 205, 222),
    "blue": (185, 222, 255),
    "green": (196, 240, 196),
    "orange": (255, 212, 160),
    "purple": (218, 202, 250),
    "gray": (210, 210, 210),
}
SPLITS = ("train", "heldout")
HELDOUT_PAIRS = 0.10  # share of unordered pairs of names that no training picture contains
HELDOUT_TONES = 0.10  # share of (base, skin tone) combinations that no training picture contains


@dataclass(frozen=True)
class Placement:
    """One sprite: a vocabulary or tone name, its top left corner and its side, in pixels."""

    name: str
    x: int
    y: int
    size: int


@dataclass(frozen=True)
class Scene:
    """A background colour (a key of BACKGROUNDS) and sprites, rendered in order. Hashable; to and from JSON."""

    background: str = "white"
    placements: tuple[Placement, ...] = ()

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"unknown background {self.background!r}; known: {', '.join(BACKGROUNDS)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sprites, in the order of rendering."""
        return tuple(p.name for p in self.placements)

    def to_json(self) -> dict[str, Any]:
        """JSON for `meta`, which evaluation reads: never change keys or order."""
        return {"background": self.background, "placements": [[p.name, p.x, p.y, p.size] for p in self.placements]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Scene:
        """Inverse of `to_json`."""
        return Scene(
            data["background"], tuple(Placement(n, int(x), int(y), int(s)) for n, x, y, s in data["placements"])
        )


def render(scene: Scene, atlas: Atlas, side: int = SIDE) -> torch.Tensor:
    """The picture of a scene: uint8 (side, side, 3). ValueError if a sprite leaves the picture."""
    canvas = np.empty((side, side, 3), dtype=np.uint16)
    canvas[:] = BACKGROUNDS[scene.background]
    for p in scene.placements:
        if not (0 <= p.x <= side - p.size and 0 <= p.y <= side - p.size):
            raise ValueError(f"{p} does not fit a picture of {side} x {side} pixels")
        sprite = atlas.sprite_array(p.name, p.size).astype(np.uint16)
        alpha = sprite[..., 3:]
        window = canvas[p.y : p.y + p.size, p.x : p.x + p.size]
        total = sprite[..., :3] * alpha + window * (255 - alpha) + 128  # at most 65,153: fits 16 bits
        window[:] = (total + (total >> 8)) >> 8  # = round(total / 255), without a division
    return torch.from_numpy(canvas.astype(np.uint8))


def single(name: str, background: str = "white", at: tuple[int, int] | None = None) -> Scene:
    """One emoji: 60 pixels wide, or 30 at the given corner."""
    x, y = BIG_AT if at is None else at
    return Scene(background, (Placement(name, x, y, BIG if at is None else SMALL),))


def small_objects(names: Sequence[str], slots: Sequence[tuple[int, int]], background: str = "white") -> Scene:
    """30-pixel emoji at the given corners."""
    assert len(names) == len(slots), (names, slots)
    return Scene(background, tuple(Placement(n, x, y, SMALL) for n, (x, y) in zip(names, slots, strict=True)))


def row(names: Sequence[str], background: str = "white") -> Scene:
    """Three 20-pixel emoji from left to right."""
    return Scene(background, tuple(Placement(n, x, y, ROW) for n, (x, y) in zip(names, ROW_SLOTS, strict=True)))


def counted(name: str, number: int, background: str = "white") -> Scene:
    """The same emoji 2, 3 or 4 times, at fixed places."""
    return small_objects((name,) * number, COUNT_SLOTS[number], background)


@cache
def pair_is_heldout(first: str, second: str) -> bool:
    """Whether no training picture contains both names, in either order. Independent of any seed. Keyed by these
    strings: another key moves test pairs into training."""
    if first == second:
        return False
    key = Key(0).fold("emoji_world", "pairs", *sorted((first, second)))
    return key.integer() / 2**63 < HELDOUT_PAIRS


def scene_is_heldout(scene: Scene) -> bool:
    """Whether any two of the scene's names are a held-out pair."""
    names = scene.names
    return any(pair_is_heldout(a, b) for i, a in enumerate(names) for b in names[:i])


@cache
def tone_is_heldout(name: str) -> bool:
    """Whether no training picture contains this tone name ("nose: dark skin tone"). Independent of any seed. Keyed by
    these strings, as above."""
    return Key(0).fold("emoji_world", "tones", name).integer() / 2**63 < HELDOUT_TONES


def tones_of(names: Sequence[str], split: str) -> tuple[str, ...]:
    """The tone names of a split."""
    return tuple(name for name in names if tone_is_heldout(name) == (split == "heldout"))


def draw_names(rng: random.Random, number: int, split: str, pool: Sequence[str] = SCENE_NAMES) -> list[str]:
    """Distinct names for one picture: in train without a held-out pair; in heldout the first two are one."""
    assert split in SPLITS, split
    while True:
        names = rng.sample(pool, number)
        pairs = [pair_is_heldout(a, b) for i, a in enumerate(names) for b in names[:i]]
        if (split == "heldout" and pairs and pairs[0]) or (split == "train" and not any(pairs)):
            return names


def draw_background(rng: random.Random, white: float = 0.5) -> str:
    """White with the given probability, else one of the seven colours."""
    return "white" if rng.random() < white else rng.choice(list(BACKGROUNDS)[1:])


def _random_single(rng: random.Random, atlas: Atlas, split: str) -> Scene:
    """One big emoji."""
    names = atlas.names if rng.random() < 0.9 else tones_of(atlas.tones, split)  # plain names are never held out
    return single(rng.choice(names), draw_background(rng))


def _random_small(rng: random.Random, atlas: Atlas, split: str) -> Scene:
    """One to four small emoji."""
    number = rng.choice((1, 2, 2, 2, 3, 4))
    background = draw_background(rng)
    if number == 1:
        return single(rng.choice(SCENE_NAMES), background, rng.choice(tuple(PLACES.values())))
    slots: Sequence[tuple[int, int]] = COUNT_SLOTS[number]
    if number == 2:
        slots = rng.choice((*PAIR_SLOTS, rng.choice(APART)))
    names = [rng.choice(SCENE_NAMES)] * number if rng.random() < 0.3 else draw_names(rng, number, split)
    return small_objects(names, slots, background)


def _random_row(rng: random.Random, atlas: Atlas, split: str) -> Scene:
    """Three emoji in a row."""
    return row(draw_names(rng, 3, split, ROW_NAMES), draw_background(rng))


# (share, function); the order decides the samples: never reorder.
_KINDS: tuple[tuple[float, Callable[[random.Random, Atlas, str], Scene]], ...] = (
    (0.6, _random_single),
    (0.3, _random_small),
    (0.1, _random_row),
)


def random_scene(key: Key, atlas: Atlas, split: str = "train") -> Scene:
    """A random scene of the kinds in documents, for codec training and tests; a pure function of (key, split).

    Six in ten are one big emoji (any vocabulary or tone name), three are one to four small ones, one is a row.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    rng = key.fold("random_scene", split).python()
    weights, kinds = zip(*_KINDS, strict=True)
    return rng.choices(kinds, weights)[0](rng, atlas, split)
