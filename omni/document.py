"""Document: ordered segments of text, images and videos, each with a role and a supervise flag.

The one currency between datasets, chat, the engine, evaluation and the command line. Plain data, no model.
Consecutive segments of one role form one turn. Media are uint8 RGB tensors: an image is (H, W, 3), a video
is (T, H, W, 3). `supervise` says whether the training loss covers the segment.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import torch


class Role(StrEnum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True)
class Text:
    """A stretch of literal text. It never contains control tokens, whatever it spells."""

    text: str
    role: Role = Role.USER
    supervise: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise ValueError(f"Text.text must be a str, got {type(self.text).__name__}")


@dataclass(frozen=True)
class Choice:
    """One of the equally good answers to a request: the `index`-th of `group`. The answers of all groups of a `family`
    differ in like ways (see omni.coupling)."""

    family: str
    group: str
    index: int


@dataclass(frozen=True, eq=False)
class Image:
    """One picture: `pixels` is uint8 (H, W, 3), RGB. choices: which of many right answers it is, where known.
    others: some more of those answers, which training may take in its place; nothing else reads them."""

    pixels: torch.Tensor
    role: Role = Role.USER
    supervise: bool = False
    choices: tuple[Choice, ...] = ()
    others: tuple[Image, ...] = ()

    def __post_init__(self) -> None:
        _check_media(self.pixels, 3, "Image.pixels", "(H, W, 3)")

    def __repr__(self) -> str:
        height, width, _ = self.pixels.shape
        return f"<{self.role} image {height}x{width}{' supervised' if self.supervise else ''}>"


@dataclass(frozen=True, eq=False)
class Video:
    """A clip: `frames` is uint8 (T, H, W, 3), RGB, at `fps` frames per second."""

    frames: torch.Tensor
    fps: float = 8.0
    role: Role = Role.USER
    supervise: bool = False

    def __post_init__(self) -> None:
        _check_media(self.frames, 4, "Video.frames", "(T, H, W, 3)")

    def __repr__(self) -> str:
        frames, height, width, _ = self.frames.shape
        supervised = " supervised" if self.supervise else ""
        return f"<{self.role} clip of {frames} frames, {height}x{width}, {self.fps:g} fps{supervised}>"


Segment = Text | Image | Video


def _check_media(value: torch.Tensor, ndim: int, name: str, shape: str) -> None:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.uint8 or value.ndim != ndim or value.shape[-1] != 3:
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a uint8 tensor {shape}, got {got}; omni.media.load_image makes one")
    if value.numel() == 0:
        raise ValueError(f"{name} is empty: shape {tuple(value.shape)}")


@dataclass(frozen=True)
class Document:
    """Ordered segments plus free metadata (`meta` must be JSON-serialisable; the model never sees it)."""

    segments: tuple[Segment, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def turns(self) -> Iterator[tuple[Role, tuple[Segment, ...]]]:
        """Maximal runs of segments with one role, in order."""
        run: list[Segment] = []
        for segment in self.segments:
            if run and segment.role != run[0].role:
                yield run[0].role, tuple(run)
                run = []
            run.append(segment)
        if run:
            yield run[0].role, tuple(run)

    def images(self) -> list[Image]:
        return [s for s in self.segments if isinstance(s, Image)]

    def to_json(self) -> str:
        """Lossless JSON; media as base64 of zlib-compressed raw bytes with their shape."""
        return json.dumps({"segments": [_segment_to_dict(s) for s in self.segments], "meta": dict(self.meta)})

    @staticmethod
    def from_json(text: str) -> Document:
        """Inverse of `to_json`. Raises ValueError on an unknown segment type."""
        data = json.loads(text)
        return Document(tuple(_segment_from_dict(d) for d in data["segments"]), data.get("meta", {}))


def _pack_media(value: torch.Tensor) -> dict[str, Any]:
    raw = zlib.compress(value.contiguous().numpy().tobytes())
    return {"shape": list(value.shape), "zlib": base64.b64encode(raw).decode()}


def _unpack_media(data: dict[str, Any]) -> torch.Tensor:
    num_bytes = 1
    for size in data["shape"]:
        num_bytes *= int(size)
    raw = zlib.decompressobj().decompress(base64.b64decode(data["zlib"]), num_bytes + 1)  # bounded: no zip bombs
    if len(raw) != num_bytes:
        raise ValueError(f"media bytes do not match their shape {data['shape']}")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(data["shape"])


def _segment_to_dict(segment: Segment) -> dict[str, Any]:
    base: dict[str, Any] = {"role": str(segment.role), "supervise": segment.supervise}
    if isinstance(segment, Text):
        return {"type": "text", "text": segment.text, **base}
    if isinstance(segment, Image):
        more: dict[str, Any] = {"choices": [asdict(choice) for choice in segment.choices]} if segment.choices else {}
        if segment.others:
            more["others"] = [_segment_to_dict(other) for other in segment.others]
        return {"type": "image", **_pack_media(segment.pixels), **more, **base}
    return {"type": "video", "fps": segment.fps, **_pack_media(segment.frames), **base}


def _segment_from_dict(data: dict[str, Any]) -> Segment:
    role, supervise = Role(data["role"]), bool(data["supervise"])
    match data["type"]:
        case "text":
            return Text(data["text"], role, supervise)
        case "image":
            choices = tuple(Choice(**choice) for choice in data.get("choices", ()))
            others = [_segment_from_dict(other) for other in data.get("others", ())]
            return Image(
                _unpack_media(data), role, supervise, choices, tuple(o for o in others if isinstance(o, Image))
            )
        case "video":
            return Video(_unpack_media(data), float(data["fps"]), role, supervise)
    raise ValueError(f"unknown segment type {data['type']!r}; known: text, image, video")
