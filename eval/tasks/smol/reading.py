"""What a picture shows of the things that a request accepts: the nearest of all names, on the picture's own background.

Pictures are uint8 (64, 64, 3). Places are those of the renderer: one big emoji, or two small ones beside or above one
another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from eval.metrics.emoji_judge import EMPTY, MAX_RATIO, Found, Judge, Slot
from eval.tasks.smol.requests import Side, accepts
from omni.data.emoji_world.scene import BIG, BIG_AT, BOTTOM, LEFT, RIGHT, SMALL, TOP

BIG_SLOT: Slot = (*BIG_AT, BIG)
PLACES: Mapping[Side, Slot] = {
    "left": (*LEFT, SMALL),
    "right": (*RIGHT, SMALL),
    "above": (*TOP, SMALL),
    "below": (*BOTTOM, SMALL),
}


@dataclass(frozen=True)
class Seen:
    """One place of a picture. is_accepted: the nearest name is an accepted emoji. is_sharp: it is as near as a render
    that the codec reconstructed, and clearly nearer than any other emoji."""

    found: Found
    background: str
    is_accepted: bool
    is_sharp: bool

    def __str__(self) -> str:
        doubt = "" if self.is_sharp else f", not sharp (ratio {self.found.ratio:.2f})"
        return f"{self.found.name} ({self.found.distance:.0f}) on {self.background}{doubt}"


def see(judge: Judge, picture: Tensor, slot: Slot, accepted: Sequence[str]) -> Seen:
    """The content of a place."""
    [background] = judge.backgrounds(picture[None])
    [found] = judge.nearest(picture[None], [background], slot, judge.atlas.names)
    sharp = found.distance <= judge.sharp[slot[2]] and found.ratio <= MAX_RATIO
    return Seen(found, background, accepts(accepted, judge.atlas.char(found.name)), sharp)


def see_one(judge: Judge, picture: Tensor, accepted: Sequence[str]) -> Seen:
    """A picture of one thing."""
    return see(judge, picture, BIG_SLOT, accepted)


def see_pair(judge: Judge, picture: Tensor, accepted: Mapping[Side, Sequence[str]]) -> list[Seen]:
    """A picture of two things, by place."""
    return [see(judge, picture, PLACES[side], those) for side, those in accepted.items()]


def shows_anywhere(judge: Judge, picture: Tensor, accepted: Sequence[str]) -> bool:
    """Whether an accepted emoji is in the big place or in one of the small ones, clearly nearer than any other emoji,
    and than nothing."""
    grounds, pool = judge.backgrounds(picture[None]), (*judge.atlas.names, EMPTY)
    for slot in (BIG_SLOT, *PLACES.values()):
        [found] = judge.nearest(picture[None], grounds, slot, pool)
        if found.name != EMPTY and found.ratio <= MAX_RATIO and accepts(accepted, judge.atlas.char(found.name)):
            return True
    return False
