"""The parts of a reply and the ordered stream of events: the whole output of the engine.

Terminal, files, evaluation and any server read this one stream; none of them reads the engine's state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image as PILImage
from torch import Tensor

# ---- parts of a reply; `content` is the part as a content part of a message (see text.chat) -------------------------


@dataclass(frozen=True)
class TextPart:
    text: str

    def content(self) -> dict[str, Any]:
        return {"type": "text", "text": self.text}

    def made_by(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, eq=False)
class ImagePart:
    """A generated picture. index: its number among the media of the reply, from 0.

    steps: jumps from noise to the picture. evaluations: function evaluations (NFE) of these jumps; every guidance
    branch counts.
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
    """A generated clip: frames uint8 (T, H, W, 3) at `fps` frames per second, from the request or the clip's header.
    steps: of each block; evaluations: of all blocks."""

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
    """After refinement step `step` of `steps`: the latents (N, C) at that time. block: its number in its clip, from
    0."""

    index: int
    step: int
    steps: int
    latents: Tensor = field(repr=False)
    block: int = 0


@dataclass(frozen=True)
class BlockDone:
    index: int
    part: ImagePart | VideoPart


@dataclass(frozen=True)
class Stop:
    """Why the reply ended: "end", the model emitted the end token; "stop", a stop string; "length", max_tokens or the
    model's longest context; "images", a picture or clip beyond max_images, or no codec."""

    reason: StopReason


@dataclass(frozen=True)
class Drafted:
    """One round of speculative decoding: the numbers of drafted and accepted tokens, and of transformer passes. again:
    the draft comes from the verification logits after a rejected token, not from the head."""

    drafted: int
    accepted: int
    passes: int
    again: bool = False


@dataclass(frozen=True)
class Failed:
    """The request ended with an error; other requests go on."""

    error: Exception


Event = TextDelta | Drafted | BlockStart | BlockStep | BlockDone | Stop | Failed
