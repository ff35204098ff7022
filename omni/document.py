"""Document: ordered segments of text, images and videos, each with a role and a supervise flag.

The common data type of datasets, chat, the engine, evaluation and the command line. Plain data, no model. Consecutive
segments of one role are one turn. Media are uint8 RGB tensors: an image is (H, W, 3), a video is (T, H, W, 3).
`supervise`: whether the training loss covers the segment.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from numbers import Real
from typing import Any

import torch

from omni.config import nearest, parse_json

# Limits of one Document read from JSON or from chat messages.
MAX_DOCUMENT_PIXELS = 200_000_000  # of all pictures and frames
MAX_DOCUMENT_FRAMES = 10_000  # pictures and frames of clips
MAX_JSON_BYTES = 64 << 20
MAX_JSON_VALUES = 2_000_000  # a value of JSON takes up to 100 bytes of memory
MIN_FPS, MAX_FPS = 0.001, 1000.0


class Role(StrEnum):
    """Roles of turns. The values are stored in documents: never change them."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True)
class Text:
    """Literal text. It never contains control tokens, whatever its characters."""

    text: str
    role: Role = Role.USER
    supervise: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise ValueError(f"Text.text must be a str, got {type(self.text).__name__}")


@dataclass(frozen=True, eq=False)
class Image:
    """One picture: `pixels` is uint8 (H, W, 3), RGB."""

    pixels: torch.Tensor
    role: Role = Role.USER
    supervise: bool = False

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
        object.__setattr__(self, "fps", check_fps(self.fps, "Video.fps"))

    def __repr__(self) -> str:
        frames, height, width, _ = self.frames.shape
        supervised = " supervised" if self.supervise else ""
        return f"<{self.role} clip of {frames} frames, {height}x{width}, {self.fps:g} fps{supervised}>"


Segment = Text | Image | Video


def check_fps(value: Any, name: str = "fps") -> float:
    """Frames per second as a float. ValueError naming `name` unless it is a number from MIN_FPS to MAX_FPS."""
    if isinstance(value, bool) or not isinstance(value, Real) or not MIN_FPS <= float(value) <= MAX_FPS:
        raise ValueError(f"{name} must be a number above 0, got {value!r:.40}; give one from {MIN_FPS} to {MAX_FPS:g}")
    return float(value)


class Budget:
    """The remaining size of one document. `take` raises ValueError before the limit is exceeded."""

    def __init__(self, max_pixels: int = MAX_DOCUMENT_PIXELS, max_frames: int = MAX_DOCUMENT_FRAMES) -> None:
        self.max_pixels, self.max_frames = max_pixels, max_frames
        self.pixels = self.frames = 0

    def take(self, shape: Sequence[int]) -> None:
        """Count a picture (H, W, 3) or a clip (T, H, W, 3)."""
        frames = 1 if len(shape) == 3 else shape[0]
        self.frames += frames
        self.pixels += frames * shape[-3] * shape[-2]
        if self.frames > self.max_frames:
            raise ValueError(f"more than {self.max_frames} pictures and frames in one document; split it")
        if self.pixels > self.max_pixels:
            raise ValueError(f"more than {self.max_pixels} pixels in one document; give smaller or fewer pictures")


def _check_media(value: torch.Tensor, ndim: int, name: str, shape: str) -> None:
    """ValueError unless `value` is uint8, of `ndim` axes, the last of 3, and not empty."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.uint8 or value.ndim != ndim or value.shape[-1] != 3:
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a uint8 tensor {shape}, got {got}; omni.media.load_image makes one")
    if value.numel() == 0:
        raise ValueError(f"{name} is empty: shape {tuple(value.shape)}")


@dataclass(frozen=True)
class Document:
    """Ordered segments plus free metadata (`meta` must be JSON-serialisable; it is not an input of the model)."""

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
        """The pictures, in order; no clips."""
        return [s for s in self.segments if isinstance(s, Image)]

    def to_json(self) -> str:
        """Lossless JSON; media as base64 of zlib-compressed raw bytes with their shape."""
        return json.dumps({"segments": [_segment_to_dict(s) for s in self.segments], "meta": dict(self.meta)})

    @staticmethod
    def from_json(
        text: str,
        *,
        max_pixels: int = MAX_DOCUMENT_PIXELS,
        max_frames: int = MAX_DOCUMENT_FRAMES,
        max_bytes: int = MAX_JSON_BYTES,
    ) -> Document:
        """Inverse of `to_json`. Raises a one-line ValueError for anything else.

        The text is untrusted: shapes are counted against `max_pixels` and `max_frames` (of all pictures and clips
        together) before media are decompressed, and memory is allocated as bytes arrive.
        """
        data = _mapping_with_keys(
            parse_bounded(text, "the Document", max_bytes), "the Document", ("segments",), ("meta",)
        )
        segments, meta = data["segments"], data.get("meta", {})
        if not isinstance(segments, list):
            raise ValueError(f"segments of the Document must be a list, got {type(segments).__name__}")
        if not isinstance(meta, dict):
            raise ValueError(f"meta of the Document must be a mapping, got {type(meta).__name__}")
        budget = Budget(max_pixels, max_frames)
        read: list[Segment] = []
        for index, segment in enumerate(segments):
            try:
                read.append(_segment_from_dict(segment, budget))
            except ValueError as error:
                raise ValueError(f"segment {index}: {error}") from None
        return Document(tuple(read), meta)


def parse_bounded(text: str, name: str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value of a JSON text, called `name` in errors. ValueError for invalid, too large or too deep JSON."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a str of JSON, got {type(text).__name__}")
    if len(text) > max_bytes:
        raise ValueError(f"{name} has more than {max_bytes} bytes of JSON; make it smaller or raise the bound")
    if sum(map(text.count, "[{,")) > MAX_JSON_VALUES:
        raise ValueError(f"{name} has more than {MAX_JSON_VALUES} JSON values; split it")
    return parse_json(text, name)


def _mapping_with_keys(data: Any, name: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """`data` as a mapping with the keys `needed` and none but these and `optional`. ValueError otherwise."""
    if not isinstance(data, dict):
        raise ValueError(f"{name} must be a mapping, got {type(data).__name__}")
    for key in needed:
        if key not in data:
            raise ValueError(f"{name} has no key {key!r}; Document.to_json() writes one")
    for key in data:
        if key not in needed + optional:
            hint = nearest(key, needed + optional) or f"; known: {', '.join(needed + optional)}"
            raise ValueError(f"{name} has the unknown key {key!r:.80}{hint}")
    return data


def _pack_media(value: torch.Tensor) -> dict[str, Any]:
    """Shape and compressed bytes, as `_unpack_media` reads them. Stored: never change the keys."""
    raw = zlib.compress(value.contiguous().numpy().tobytes())
    return {"shape": list(value.shape), "zlib": base64.b64encode(raw).decode()}


def _unpack_media(data: Mapping[str, Any], ndim: int, budget: Budget) -> torch.Tensor:
    """Inverse of `_pack_media`; counts the shape against the budget before memory is allocated."""
    shape, packed = data["shape"], data["zlib"]
    good = isinstance(shape, list) and len(shape) == ndim and all(type(size) is int and size > 0 for size in shape)
    if not good or shape[-1] != 3:
        axes = "[height, width, 3]" if ndim == 3 else "[frames, height, width, 3]"
        raise ValueError(f"shape must be {axes} of whole numbers above 0, got {shape!r:.80}")
    budget.take(shape)
    if not isinstance(packed, str):
        raise ValueError(f"zlib must be a str of base64, got {type(packed).__name__}")
    num_bytes = 1
    for size in shape:
        num_bytes *= size
    try:
        raw = _inflate(base64.b64decode(packed, validate=True), num_bytes)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ValueError(f"zlib is not base64 of zlib data: {error}; write it with Document.to_json()") from None
    if len(raw) != num_bytes:
        raise ValueError(f"media bytes do not match their shape {shape}")
    return torch.frombuffer(raw, dtype=torch.uint8).reshape(shape)


def _inflate(data: bytes, num_bytes: int) -> bytearray:
    """The decompressed bytes, at most `num_bytes` + 1, piece by piece: a false size allocates no memory."""
    inflater, out = zlib.decompressobj(), bytearray()
    while len(out) <= num_bytes and not inflater.eof:
        piece = inflater.decompress(data, min(num_bytes + 1 - len(out), 1 << 20))
        if not piece:
            break
        out += piece
        data = inflater.unconsumed_tail
    return out


def _segment_to_dict(segment: Segment) -> dict[str, Any]:
    """JSON of a segment. Stored: never change the keys."""
    base: dict[str, Any] = {"role": str(segment.role), "supervise": segment.supervise}
    if isinstance(segment, Text):
        return {"type": "text", "text": segment.text, **base}
    if isinstance(segment, Image):
        return {"type": "image", **_pack_media(segment.pixels), **base}
    return {"type": "video", "fps": segment.fps, **_pack_media(segment.frames), **base}


# Keys of a segment in JSON, by its type.
_BASE = ("type", "role", "supervise")
_KEYS = {"text": (*_BASE, "text"), "image": (*_BASE, "shape", "zlib"), "video": (*_BASE, "fps", "shape", "zlib")}


def _segment_from_dict(data: Any, budget: Budget) -> Segment:
    """Inverse of `_segment_to_dict`. ValueError for anything else."""
    kind = data.get("type") if isinstance(data, dict) else None
    if isinstance(data, dict) and (not isinstance(kind, str) or kind not in _KEYS):
        raise ValueError(f"unknown segment type {kind!r:.80}; known: text, image, video")
    data = _mapping_with_keys(data, "it", _KEYS.get(kind or "", ()))
    role, supervise = data["role"], data["supervise"]
    roles = [str(known) for known in Role]
    if not isinstance(role, str) or role not in roles:
        raise ValueError(f"unknown role {role!r:.80}{nearest(str(role), roles) or '; known: ' + ', '.join(roles)}")
    if not isinstance(supervise, bool):
        raise ValueError(f"supervise must be true or false, got {supervise!r:.80}")
    if kind == "text":
        return Text(data["text"], Role(role), supervise)
    if kind == "video":
        fps = check_fps(data["fps"])
        return Video(_unpack_media(data, 4, budget), fps, Role(role), supervise)
    return Image(_unpack_media(data, 3, budget), Role(role), supervise)
