"""Two generated corpora: chat documents with pictures of emoji, and clips of moving emoji.

Clips: frames uint8 (T, S, S, 3); a sprite crosses a plain background, so the text determines every pixel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from omni.config import Frozen
from omni.data.digests import generated_fingerprint
from omni.data.source import SOURCES, Source
from omni.document import Document, Role, Text, Video
from omni.rng import Key


class EmojiWorldOptions(Frozen):
    """split: see EmojiWorld. font: None finds the installed one."""

    split: Literal["train", "heldout"] = "train"
    font: Path | None = None
    mixture: dict[str, float] | None = Field(None, description="task -> weight; the world's own when absent")
    foreign: float = Field(0.0, ge=0, le=1, description="share of phrasings with a foreign word")


@SOURCES.register("emoji_world")
class EmojiWorldSource(Source):
    """The corpus of omni.data.emoji_world; that package has the tasks."""

    Options = EmojiWorldOptions

    def __init__(self, options: EmojiWorldOptions, key: Key) -> None:
        from omni.data.emoji_world import Atlas, EmojiWorld

        super().__init__(options, key)
        atlas = Atlas(options.font)
        extra: dict[str, Any] = {} if options.mixture is None else {"mixture": options.mixture}
        extra |= {"split": options.split, "foreign": options.foreign}
        self.world = EmojiWorld(atlas, key.integer(), **extra)
        self._font_path = atlas.font_path

    def document(self, index: int) -> Document:
        return self.world.document(index)

    def fingerprint(self) -> str:
        return generated_fingerprint(self.world.document, self._font_path)


# Clip i shows name i modulo their number, in direction by index: never reorder either.
CLIP_NAMES = (
    *("red apple", "banana", "cat face", "dog face", "rocket", "bicycle"),
    *("red heart", "star", "pizza", "tree", "umbrella", "soccer ball"),
)
DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}


class MovingEmojiOptions(Frozen):
    """num_clips: document i is clip i % num_clips, all different. The first ones show the names of CLIP_NAMES, in four
    directions each; then come the atlas's other names. prompt: the text before a clip, where {name} and {direction}
    stand for its own; without them the prompt leaves the clip open."""

    num_clips: int = Field(12, ge=1, le=4000)
    prompt: str = "a {name} moves {direction}"
    num_frames: int = Field(8, ge=2, le=64)
    side: int = Field(32, ge=16, le=128, description="of a frame, in pixels")
    sprite: int = Field(16, ge=8, le=64, description="side of the emoji, in pixels")
    fps: float = Field(8.0, gt=0)
    font: Path | None = None


@SOURCES.register("moving_emoji")
class MovingEmojiSource(Source):
    """Clip i (of num_clips): one emoji crosses the frame. `document(index)` is clip index % num_clips."""

    Options = MovingEmojiOptions

    def __init__(self, options: MovingEmojiOptions, key: Key) -> None:
        from omni.data.emoji_world import Atlas

        super().__init__(options, key)
        if options.sprite >= options.side:
            raise ValueError(f"moving_emoji: sprite {options.sprite} must be smaller than side {options.side}")
        self.atlas = Atlas(options.font)
        known = set(self.atlas.names)
        self.names = [name for name in CLIP_NAMES if name in known] or list(self.atlas.names[:12])
        self.more_names = [name for name in self.atlas.names if name not in self.names]

    def document(self, index: int) -> Document:
        name, direction = self.shown(index % self.options.num_clips)
        prompt = self.options.prompt.replace("{name}", name).replace("{direction}", direction)
        return Document(
            (
                Text(prompt, Role.USER),
                Video(self.frames(name, direction), self.options.fps, Role.ASSISTANT, supervise=True),
            ),
            {"task": "clip", "name": name, "direction": direction},
        )

    def shown(self, clip: int) -> tuple[str, str]:
        """The name and direction of a clip."""
        first = len(self.names) * len(DIRECTIONS)
        names, clip = (self.names, clip) if clip < first else (self.more_names, clip - first)
        round_, number = divmod(clip, len(names))
        return names[number], list(DIRECTIONS)[(number + round_) % len(DIRECTIONS)]

    def frames(self, name: str, direction: str) -> torch.Tensor:
        """uint8 (num_frames, side, side, 3): the emoji moves from one edge to the other."""
        options = self.options
        sprite = self.atlas.sprite(name, options.sprite).float()
        colour, alpha = sprite[..., :3], sprite[..., 3:] / 255.0
        down, right = DIRECTIONS[direction]
        room = options.side - options.sprite
        frames = torch.full((options.num_frames, options.side, options.side, 3), 255.0)
        for t, frame in enumerate(frames):
            travelled = round(room * t / (options.num_frames - 1))
            y = _offset(down, room, travelled)
            x = _offset(right, room, travelled)
            window = frame[y : y + options.sprite, x : x + options.sprite]
            window.copy_(colour * alpha + window * (1 - alpha))
        return frames.round().to(torch.uint8)


def _offset(direction: int, room: int, travelled: int) -> int:
    """Pixels from the edge after `travelled` pixels; the middle of the room for direction 0."""
    if direction == 0:
        return room // 2
    return travelled if direction > 0 else room - travelled
