"""The judge of the emoji world: finds what a picture shows. Template match against the renderer, no model.

Every slot (corner and side of a sprite) of a picture is compared with the renders of a pool of names on the picture's
background, by mean squared error over RGB; the smallest error gives the name. A render is
alpha * colour + (1 - alpha) * background, so one pair of matrices per size serves all backgrounds:

    |x - T|^2 = |x|^2 - 2 (x . A + sum_p c_p (x_p . b)) + |A|^2 + 2 b . G + |b|^2 S

Shapes: B pictures, N names, P = size * size pixels of a slot; x (B, P, 3) crops and b (B, 3) backgrounds in
levels of 0..255; A (N, P, 3) = alpha * colour; c (N, P) = 1 - alpha; G (N, 3) = sum_p c_p A_p; S (N,) = sum_p c_p^2.
Distances are root mean squares over the pixels and channels of the slot, in levels of 0..255.

An answer is wrong where the name is wrong, where a second name is nearly as near (`MAX_RATIO`: a mean of two emoji is
equally near to both; skin tones of one emoji count as one), where something lies outside the slots (`MAX_OUTSIDE`), or
where the background differs; for open requests also where it is blurred: a distance above `sharp` (see `calibrate`).
The judge does not search positions: slots are those of the renderer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from omni.data.emoji_world.atlas import Atlas
from omni.data.emoji_world.objects import SCENE_NAMES
from omni.data.emoji_world.scene import (
    APART,
    BACKGROUNDS,
    BIG,
    BIG_AT,
    CENTRE,
    PLACES,
    ROW,
    SMALL,
    Placement,
    Scene,
    render,
)
from omni.rng import Key

EMPTY = ""  # the name of a slot that shows nothing but background
MAX_RATIO = 0.8  # the nearest name's distance over the second's; 1.0 for the mean of two emoji
MAX_OUTSIDE = (
    20.0  # root mean square outside the slots; a stray 30-pixel emoji gives 40 and more, a pale one on gray down to 8
)
MAX_SHARP = 18.0  # 1 % of the means of two members of a class are clear and as near as this to a render (tests/eval)
CALIBRATION_FACTOR = 1.25

Slot = tuple[int, int, int]  # x, y, size
K = TypeVar("K")
R = TypeVar("R")


class Templates:
    """The renders of `names` at one size, on any background. The name `EMPTY` is the background alone."""

    def __init__(self, atlas: Atlas, names: Sequence[str], size: int) -> None:
        self.names = tuple(names)
        self.size = size
        bases = [name.rpartition(": ")[0] if name.endswith(" skin tone") else name for name in names]
        self.base_N = torch.tensor([bases.index(base) for base in bases])  # skin tones of one emoji share a number
        blank = torch.zeros(size, size, 4, dtype=torch.uint8)
        sprites = torch.stack([blank if n == EMPTY else atlas.sprite(n, size) for n in names]).float()
        alpha = sprites[..., 3:] / 255
        self.colour_NPC = (sprites[..., :3] * alpha).reshape(len(names), -1, 3)
        self.clear_NP = (1 - alpha).reshape(len(names), -1)
        self.colour_square_N = self.colour_NPC.square().sum((1, 2))
        self.cross_NC = torch.einsum("np,npc->nc", self.clear_NP, self.colour_NPC)
        self.clear_square_N = self.clear_NP.square().sum(1)

    def distances(self, crops: torch.Tensor, backgrounds: torch.Tensor) -> torch.Tensor:
        """(B, P, 3) float crops and (B, 3) background levels -> (B, N) root mean square distances."""
        num_values = crops.shape[1] * 3
        dot_BN = crops.flatten(1) @ self.colour_NPC.flatten(1).T
        dot_BN += torch.einsum("bpc,bc->bp", crops, backgrounds) @ self.clear_NP.T
        square_BN = self.colour_square_N + 2 * backgrounds @ self.cross_NC.T
        square_BN = square_BN + backgrounds.square().sum(1, keepdim=True) * self.clear_square_N
        total = crops.square().sum((1, 2))[:, None] - 2 * dot_BN + square_BN
        return (total.clamp_min(0) / num_values).sqrt()


@dataclass(frozen=True)
class Found:
    """The content of a slot: the nearest name, its distance, and the ratio to the distance of the nearest other
    emoji."""

    name: str
    distance: float
    ratio: float


@dataclass(frozen=True)
class Reading:
    """The content of a picture, slot by slot, and the distance of all other pixels from the background."""

    scene: Scene  # the placements that are not empty
    slots: tuple[Slot, ...]
    found: tuple[Found, ...]
    outside: float

    @property
    def clear(self) -> bool:
        """Whether each slot has one best name, and nothing lies outside the slots."""
        return self.outside <= MAX_OUTSIDE and all(f.ratio <= MAX_RATIO for f in self.found)

    @property
    def worst(self) -> float:
        """The largest distance of a slot from its nearest render: the measure of blur."""
        return max((f.distance for f in self.found), default=0.0)

    def describe(self) -> str:
        """What the picture shows, and why it is unclear, in words."""
        names = ", ".join(f"{f.name or 'nothing'} ({f.distance:.0f})" for f in self.found)
        blur = "" if self.clear else f"; unclear (ratios {', '.join(f'{f.ratio:.2f}' for f in self.found)}"
        return f"{names} on {self.scene.background}" + (f"{blur}, outside {self.outside:.0f})" if blur else "")


class Judge:
    """Reads pictures of the emoji world. Templates are built on first use of a (pool, size).

    sharp: by sprite size, the largest distance that counts as a sharp render; `calibrate` finds it for a codec.
    """

    def __init__(self, atlas: Atlas, sharp: Mapping[int, float] | None = None) -> None:
        self.atlas = atlas
        self.sharp = {BIG: MAX_SHARP, SMALL: MAX_SHARP, ROW: MAX_SHARP, **(sharp or {})}
        self._templates: dict[tuple[tuple[str, ...], int], Templates] = {}

    def templates(self, names: Sequence[str], size: int) -> Templates:
        """The templates of a pool at a size, built once."""
        key = (tuple(names), size)
        if key not in self._templates:
            self._templates[key] = Templates(self.atlas, key[0], size)
        return self._templates[key]

    def backgrounds(self, pictures: torch.Tensor) -> list[str]:
        """The background of each picture (B, 64, 64, 3): the colour nearest to the median of its outermost pixels."""
        rim = torch.cat([pictures[:, 0], pictures[:, -1], pictures[:, 1:-1, 0], pictures[:, 1:-1, -1]], dim=1)
        median = rim.float().median(dim=1).values
        levels = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)
        return [list(BACKGROUNDS)[i] for i in torch.cdist(median, levels).argmin(1).tolist()]

    def nearest(
        self, pictures: torch.Tensor, backgrounds: Sequence[str], slot: Slot, names: Sequence[str]
    ) -> list[Found]:
        """The nearest of `names` at `slot` of each picture (B, 64, 64, 3), on each one's given background."""
        x, y, size = slot
        crops = pictures[:, y : y + size, x : x + size].reshape(len(pictures), -1, 3).float()
        levels = torch.tensor([BACKGROUNDS[name] for name in backgrounds], dtype=torch.float32)
        templates = self.templates(names, size)
        distances = templates.distances(crops, levels)
        best, index = distances.min(1)
        same = templates.base_N == templates.base_N[index][:, None]
        second = distances.masked_fill(same, torch.inf).amin(1)
        rows = zip(index.tolist(), best.tolist(), (best / second.clamp_min(1e-6)).tolist(), strict=True)
        return [Found(templates.names[i], distance, ratio) for i, distance, ratio in rows]

    def name_single(self, pictures: torch.Tensor, scenes: Sequence[Scene]) -> list[Found]:
        """For requests of one emoji: the nearest of ALL vocabulary names at the size and background of each scene."""
        assert all(len(scene.placements) == 1 for scene in scenes)
        return self._grouped(
            [(scene.placements[0].x, scene.placements[0].y, scene.placements[0].size) for scene in scenes],
            lambda slot, rows: self.nearest(
                pictures[rows], [scenes[i].background for i in rows.tolist()], slot, self.atlas.names
            ),
        )

    def read(self, pictures: torch.Tensor, slots: Sequence[Sequence[Slot]], names: Sequence[str]) -> list[Reading]:
        """The content of each picture in its given slots, among `names` and `EMPTY`, on its own background."""
        grounds = self.backgrounds(pictures)
        pool = (*names, EMPTY)

        def read_group(group: tuple[Slot, ...], rows: torch.Tensor) -> list[Reading]:
            picked = [grounds[i] for i in rows.tolist()]
            columns = [self.nearest(pictures[rows], picked, slot, pool) for slot in group]
            outside = outside_distance(pictures[rows], picked, group)
            return [
                _reading(picked[i], group, tuple(column[i] for column in columns), float(outside[i]))
                for i in range(len(rows))
            ]

        return self._grouped([tuple(s) for s in slots], read_group)

    def shows(
        self, pictures: torch.Tensor, scenes: Sequence[Scene], before: Sequence[Scene | None] | None = None
    ) -> list[Reading]:
        """The content of each picture in the slots of its expected scene: compare the reading's scene with it.

        before: the picture that an edit starts from. Its slots are read too, where they do not overlap the others: a
        remaining pale emoji may be below `MAX_OUTSIDE`.
        Names: all of the vocabulary and all skin tones for a big emoji; for small ones the names of scenes.
        """

        def pool(scene: Scene) -> tuple[str, ...]:
            if any(p.size == BIG for p in scene.placements):
                return (*self.atlas.names, *self.atlas.tones)
            return SCENE_NAMES

        earlier = before or [None] * len(scenes)
        return self._grouped(
            [(_slots_to_read(scene, old), pool(scene)) for scene, old in zip(scenes, earlier, strict=True)],
            lambda key, rows: self.read(pictures[rows], [key[0]] * len(rows), key[1]),
        )

    def is_sharp(self, reading: Reading) -> bool:
        """Whether every slot is within the threshold of one true render."""
        return all(f.distance <= self.sharp[size] for f, (_, _, size) in zip(reading.found, reading.slots, strict=True))

    def read_any(self, picture: torch.Tensor, layouts: Iterable[Sequence[Slot]], names: Sequence[str]) -> Reading:
        """The best reading of one picture (64, 64, 3) over several layouts of slots: nearest to its own render."""
        readings = [self.read(picture[None], [layout], names)[0] for layout in layouts]
        return min(readings, key=lambda reading: picture_distance(picture, render(reading.scene, self.atlas)))

    @staticmethod
    def _grouped(keys: Sequence[K], work: Callable[[K, torch.Tensor], list[R]]) -> list[R]:
        """Call `work` once per distinct key, with its rows; return the results in the order of the rows."""
        results: dict[int, R] = {}
        for key in dict.fromkeys(keys):
            rows = torch.tensor([i for i, k in enumerate(keys) if k == key])
            results.update(zip(rows.tolist(), work(key, rows), strict=True))
        return [results[i] for i in range(len(keys))]


def _reading(background: str, slots: Sequence[Slot], found: tuple[Found, ...], outside: float) -> Reading:
    """The placements of the slots that are not empty, as a reading."""
    placements = tuple(Placement(f.name, *slot) for f, slot in zip(found, slots, strict=True) if f.name != EMPTY)
    return Reading(Scene(background, placements), tuple(slots), found, outside)


def outside_distance(pictures: torch.Tensor, backgrounds: Sequence[str], slots: Sequence[Slot]) -> torch.Tensor:
    """(B,) root mean square distance from the background over the pixels outside all slots."""
    outside = torch.ones(pictures.shape[1:3], dtype=torch.bool)
    for x, y, size in slots:
        outside[y : y + size, x : x + size] = False
    levels = torch.tensor([BACKGROUNDS[name] for name in backgrounds], dtype=torch.float32)
    return (pictures[:, outside].float() - levels[:, None]).square().mean((1, 2)).sqrt()


def picture_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Root mean square difference of two uint8 pictures of one shape, in levels."""
    return float((first.float() - second.float()).square().mean().sqrt())


def slots_of(*scenes: Scene) -> tuple[Slot, ...]:
    """Every slot that any of the scenes uses, once, in order."""
    return tuple(dict.fromkeys((p.x, p.y, p.size) for scene in scenes for p in scene.placements))


def _slots_to_read(scene: Scene, before: Scene | None) -> tuple[Slot, ...]:
    """The slots of a scene, and those of the scene before that do not overlap them."""
    wanted = slots_of(scene)
    old = () if before is None else slots_of(before)
    return (*wanted, *(slot for slot in old if all(_apart(slot, other) for other in wanted)))


def _apart(first: Slot, second: Slot) -> bool:
    """Whether two slots do not overlap."""
    return any(a + first[2] <= b or b + second[2] <= a for a, b in zip(first[:2], second[:2], strict=True))


def small_layouts(number: int) -> list[tuple[Slot, ...]]:
    """The places where the renderer puts `number` small emoji if the request leaves them open; each layout once."""
    if number == 1:
        corners = [(place,) for place in PLACES.values()]
    elif number == 2:
        corners = [pair for pair in APART if pair[0] < pair[1]]
    else:
        raise ValueError(f"open layouts are known for 1 and 2 small emoji, not for {number}")
    return [tuple((x, y, SMALL) for x, y in places) for places in corners]


def calibrate(
    reconstruct: Callable[[torch.Tensor], torch.Tensor], atlas: Atlas, key: Key, num: int = 256
) -> dict[int, float]:
    """The `sharp` thresholds of a codec: distances between true renders and their reconstructions.

    For each size, `num` keyed single emoji on keyed backgrounds go through `reconstruct` (uint8 (B, 64, 64, 3) both
    ways). The threshold is 1.25 times the 99th percentile of their distances over the slot, at most MAX_SHARP: above
    it, pictures halfway between two members of a class would pass.
    """
    sharp = {}
    for size, (x, y), names in ((BIG, BIG_AT, atlas.names), (SMALL, CENTRE, SCENE_NAMES)):
        draw = key.fold("calibrate", size).python()
        scenes = [
            Scene(draw.choice(list(BACKGROUNDS)), (Placement(draw.choice(names), x, y, size),)) for _ in range(num)
        ]
        true = torch.stack([render(scene, atlas) for scene in scenes])
        back = torch.cat([reconstruct(chunk) for chunk in true.split(64)])
        window = (slice(None), slice(y, y + size), slice(x, x + size))
        errors = (true[window].float() - back[window].float()).square().mean((1, 2, 3)).sqrt()
        sharp[size] = min(MAX_SHARP, CALIBRATION_FACTOR * float(errors.quantile(0.99)))
    return sharp
