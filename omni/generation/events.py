"""The parts of a reply and the ordered stream of events: what every reader of the engine sees, and nothing else.

Terminal, files, evaluation and any server read this one stream; none of them knows the engine's state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image as PILImage
from torch import Tensor

# ---- parts: what a reply is made of; `content` is the part as a message has it (see text.chat) ----------------------


@dataclass(frozen=True)
class TextPart:
    text: str

    def content(self) -> dict[str, Any]:
        return {"type": "text", "text": self.text}

    def made_by(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, eq=False)
class ImagePart:
    """A drawn picture. index counts the pictures of the reply from 0.

    steps: jumps from noise to the picture. evaluations: passes through the transformer spent on them, counted as they
    were made; with guidance each of its branches counts (what papers call NFE).
    """

    image: PILImage.Image
    height: int
    width: int
    steps: int
    seed: int
    index: int
    evaluations: int = 0

    def content(self) -> dict[str, Any]:
        return {"type": "image", "image": self.image}

    def made_by(self) -> dict[str, Any]:
        return _made_by(self)


@dataclass(frozen=True, eq=False)
class VideoPart:
    """A drawn clip: frames uint8 (T, H, W, 3) at `fps` a second, the request's or what the model wrote in its header.
    steps: of each of its blocks; evaluations: of all of them."""

    frames: Tensor = field(repr=False)
    fps: float
    steps: int
    seed: int
    index: int
    evaluations: int = 0

    def content(self) -> dict[str, Any]:
        return {"type": "video", "video": self.frames, "fps": self.fps}

    def made_by(self) -> dict[str, Any]:
        return _made_by(self)


def _made_by(part: ImagePart | VideoPart) -> dict[str, Any]:
    return {"steps": part.steps, "evaluations": part.evaluations, "seed": part.seed, "index": part.index}


Part = TextPart | ImagePart | VideoPart
StopReason = Literal["end", "stop", "length", "images"]  # see Stop


# ---- events --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextDelta:
    text: str


@dataclass(frozen=True)
class BlockStart:
    """A block begins: kind "image" or "video", its index among the reply's media, its grid (t, h, w) in latents."""

    kind: str
    index: int
    grid: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class BlockStep:
    """After refinement step `step` of `steps`: the latents (N, C) at that time."""

    index: int
    step: int
    steps: int
    latents: Tensor = field(repr=False)


@dataclass(frozen=True)
class BlockDone:
    index: int
    part: ImagePart | VideoPart


@dataclass(frozen=True)
class Stop:
    """Why the reply is over: "end", the model ended it; "stop", a stop string; "length", max_tokens or the model's
    longest context; "images", the model asked for a picture or clip beyond max_images, or has no codec."""

    reason: StopReason


@dataclass(frozen=True)
class Drafted:
    """One round of text in blocks: how many tokens were drafted, how many of them were kept, and the passes through
    the transformer that it took. again: drafted by plain decoding, from a draft of the head that fell."""

    drafted: int
    kept: int
    passes: int
    again: bool = False


Event = TextDelta | Drafted | BlockStart | BlockStep | BlockDone | Stop
