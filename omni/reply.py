"""What generation takes and gives: options, parts of a reply, and the ordered stream of events.

Terminal, files, evaluation and any server read this one stream; none of them knows the engine's state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image as PILImage
from torch import Tensor

from omni.config import Frozen
from omni.document import Document


class GenerationOptions(Frozen):
    """One request's budget. None means the model's own default (its generation.json).

    steps: network evaluations per block (each counts once however many guidance branches it carries).
    guidance / image_guidance: weights of text and pictures, 1 is none (see omni.guidance). shift: time-grid warp.
    temperature 0 is greedy; top_p keeps the smallest set of tokens with that mass. stop: strings that end the reply.
    force_image: the reply starts with a picture. image_size: (height, width) in pixels of every picture.
    """

    steps: int | None = None
    guidance: float | None = None
    image_guidance: float | None = None
    shift: float | None = None
    sampler: str | None = None
    seed: int = 0
    temperature: float | None = None
    top_p: float = 1.0
    max_tokens: int = 256
    max_images: int = 16
    stop: tuple[str, ...] = ()
    force_image: bool = False
    image_size: tuple[int, int] | None = None

    def resolved(self, defaults: dict[str, Any]) -> GenerationOptions:
        """With the defaults filled in. Raises ValueError naming an impossible value."""
        base = {"steps": 8, "guidance": 1.0, "image_guidance": 1.0, "shift": 1.0, "temperature": 0.0, **defaults}
        filled = {n: base.get(n) for n in type(self).model_fields if getattr(self, n) is None and n in base}
        out = self.model_copy(update=filled)
        assert out.steps is not None and out.temperature is not None
        if out.steps < 1:
            raise ValueError(
                f"steps must be at least 1, got {out.steps}; one step is a single jump from noise to picture"
            )
        if out.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {out.temperature}; 0 is greedy")
        if not 0 < out.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {out.top_p}; 1 keeps every token")
        if out.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {out.max_tokens}")
        return out


# ---- what comes out ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True, eq=False)
class ImagePart:
    """A drawn picture. index counts the pictures of the reply from 0; steps is the number of evaluations spent."""

    image: PILImage.Image
    height: int
    width: int
    steps: int
    seed: int
    index: int


@dataclass(frozen=True, eq=False)
class VideoPart:
    """A drawn clip: frames uint8 (T, H, W, 3)."""

    frames: Tensor
    fps: float
    steps: int
    seed: int
    index: int


Part = TextPart | ImagePart | VideoPart
StopReason = Literal["end", "stop", "length"]


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
    latents: Tensor


@dataclass(frozen=True)
class BlockDone:
    index: int
    part: ImagePart | VideoPart


@dataclass(frozen=True)
class Stop:
    reason: StopReason


Event = TextDelta | BlockStart | BlockStep | BlockDone | Stop


@dataclass(frozen=True)
class Reply:
    """An ordered reply. `document` is the prompt followed by the reply, ready for the next turn."""

    parts: list[Part]
    document: Document
    stop_reason: StopReason

    @property
    def text(self) -> str:
        return "".join(p.text for p in self.parts if isinstance(p, TextPart))

    @property
    def images(self) -> list[PILImage.Image]:
        return [p.image for p in self.parts if isinstance(p, ImagePart)]
