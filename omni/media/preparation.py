"""Preparation: pictures and clips of any size to pixels that a codec can encode. The only resize of the project.

A model stores its preparation (preparation.json); training, the Python API, the command line and evaluation all call
`prepare`. `prepare` is idempotent. This file reads no files: decoding applies the orientation (pictures.py).

Legend: H, W pixels; T frames. Pixels are uint8 RGB, (H, W, 3) or (T, H, W, 3). A size is (height, width).
Models are trained on its pixels: a change of the arithmetic makes stored models worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor

from omni.config import Frozen, build
from omni.document import Image, Text, Video

MAX_CROP = 0.125  # share of one side that "buckets" may crop; above it, the picture is padded
MAX_ASPECT = 200  # of a picture that an encoder reads
RESIZE_PIXELS = 1 << 24  # pixels of a clip that are resized together: bounds the float32 copy
GREY = (299, 587, 114)  # thousandths of R, G, B in luma (ITU-R BT.601)

Size = tuple[int, int]
AnySegment = TypeVar("AnySegment", bound=Text | Image | Video)


class Preparation(Frozen):
    """How pictures and frames of clips get sizes that a codec can encode, and how clips fill their chunks.

    resize:
        buckets    all multiples of the stride within the budget are candidates; the nearest in aspect, then in area, is
                   the size. The aspect is kept: at most an eighth of one side is cropped, else edges are repeated
        stride     each side goes to the nearest multiple of the stride; the aspect is kept, edges are repeated
        letterbox  the picture is scaled to fit inside `size` and centred; edges are repeated around it
        crop       the picture is scaled to cover `size`; the rest is cropped, equally on both sides
    A picture of a valid size does not change. buckets and stride shrink a picture only above the budget, and enlarge it
    only to a multiple of the stride.
    """

    resize: Literal["buckets", "stride", "letterbox", "crop"] = "buckets"
    size: tuple[int, int] | None = Field(default=None, description="(height, width) in pixels, for letterbox and crop")
    max_latents: int | None = Field(
        default=None,
        ge=1,
        le=1 << 16,
        description="latents of one picture or frame, for buckets; absent: max_grid squared",
    )
    colour: Literal["rgb", "grey"] = Field(default="rgb", description="grey: luma in all three channels")
    tail: Literal["repeat", "cut"] = Field(
        default="repeat", description="last frames that fill no chunk: the last one is repeated, or they are cut"
    )
    fps: float | None = Field(default=None, ge=0.5, le=64, description="faster clips are thinned to this frame rate")
    max_frames: int | None = Field(default=None, ge=1, description="longer clips are cut to whole chunks of it")

    @model_validator(mode="after")
    def _has_effect(self) -> Preparation:
        fixed = self.resize in ("letterbox", "crop")
        if fixed and self.size is None:
            raise ValueError(f"resize = {self.resize!r} needs size = [height, width]")
        if not fixed and self.size is not None:
            raise ValueError(f"size = {list(self.size)} has no effect with resize = {self.resize!r}; leave it out")
        if self.resize != "buckets" and self.max_latents is not None:
            raise ValueError(f"max_latents = {self.max_latents} has no effect with resize = {self.resize!r}")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size must be positive, got {list(self.size)}")
        return self


def read_preparation(
    stored: Mapping[str, Any] | None, defaults: Mapping[str, Any], folder: str
) -> tuple[Preparation, dict[str, Any]]:
    """The preparation of a model directory, from its preparation.json (`stored`), and its generation defaults. Older
    models store `picture_size` in the defaults; it is removed. Without either, the default preparation. ValueError for
    an invalid table names `folder`."""
    rest = dict(defaults)
    size = rest.pop("picture_size", None)
    if stored is not None:
        return build(stored, Preparation, f"{folder}/preparation.json"), rest
    return build({"resize": "letterbox", "size": size} if size else {}, Preparation, f"{folder}: picture_size"), rest


@dataclass(frozen=True)
class Limits:
    """The limits of a codec and a model. stride: pixels per latent along (rows, columns). chunk: frames of one chunk.
    max_grid: latent rows or columns. max_chunks: chunks of one clip. missing: frames that the first chunk of a clip has
    fewer than the others (codecs whose first latent frame is one frame: clips of 1, 5, 9, ... frames)."""

    stride: Size
    chunk: int
    max_grid: int
    max_chunks: int
    missing: int = 0

    def frames(self, num_chunks: int) -> int:
        """Frames of a clip of so many chunks."""
        return num_chunks * self.chunk - self.missing


def prepare(segment: AnySegment, preparation: Preparation, limits: Limits) -> AnySegment:
    """The segment with pixels that the codec can encode. Text and prepared media are returned unchanged.

    ValueError for a clip with more chunks than the model accepts, and for a size that the codec cannot encode.
    """
    if isinstance(segment, Image):
        pixels = prepare_picture(segment.pixels, preparation, limits)
        return segment if pixels is segment.pixels else replace(segment, pixels=pixels)
    if isinstance(segment, Video):
        frames, fps = prepare_clip(segment.frames, segment.fps, preparation, limits)
        return segment if frames is segment.frames else replace(segment, frames=frames, fps=fps)
    return segment


def prepare_picture(pixels: Tensor, preparation: Preparation, limits: Limits) -> Tensor:
    """uint8 (H, W, 3) of any size -> uint8 (H', W', 3) of `target_size`."""
    _check_pixels(pixels, 3, "a picture", "(H, W, 3)")
    return _to_target_size(pixels, preparation, limits)


def prepare_clip(frames: Tensor, fps: float, preparation: Preparation, limits: Limits) -> tuple[Tensor, float]:
    """uint8 (T, H, W, 3) -> uint8 (T', H', W', 3) of whole chunks, and their frame rate.

    The clip is subsampled, cut to the whole chunks of `max_frames` and resized; the last chunk is filled or cut. A clip
    shorter than one chunk is always filled. ValueError for more than `limits.max_chunks` chunks.
    """
    _check_pixels(frames, 4, "a clip", "(T, H, W, 3)")
    given = len(frames)
    if preparation.fps is not None and not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"a clip of {fps} frames per second cannot be thinned; give its frame rate")
    if preparation.fps is not None and fps > preparation.fps:
        frames, fps = frames[_subsampled(given, fps / preparation.fps)], preparation.fps
    count, rest = divmod(len(frames) + limits.missing, limits.chunk)
    if rest and (preparation.tail == "repeat" or not count):
        count += 1
    if preparation.max_frames is not None:
        count = min(count, max(1, (preparation.max_frames + limits.missing) // limits.chunk))
    if count > limits.max_chunks:
        raise ValueError(
            f"a clip of {given} frames makes {count} chunks of {limits.chunk} frames, and this model takes at most "
            f"{limits.max_chunks} (max_chunks); cut it to {limits.frames(limits.max_chunks)} frames, or set "
            "max_frames or fps in its preparation"
        )
    num = limits.frames(count)
    frames = _to_target_size(frames if len(frames) <= num else frames[:num], preparation, limits)
    if len(frames) < num:
        frames = torch.cat([frames, frames[-1:].expand(num - len(frames), -1, -1, -1)])
    return frames, fps


def target_size(height: int, width: int, preparation: Preparation, limits: Limits) -> Size:
    """The prepared size in pixels of a picture of (height, width). ValueError for a `size` the codec cannot encode."""
    rows, columns = limits.stride
    if preparation.size is not None:
        size, largest = preparation.size, (limits.max_grid * rows, limits.max_grid * columns)
        if size[0] % rows or size[1] % columns or size[0] > largest[0] or size[1] > largest[1]:
            raise ValueError(
                f"the preparation's size {size[0]} x {size[1]} does not fit this model: it must be a multiple of the "
                f"codec's stride {rows} x {columns}, and at most {largest[0]} x {largest[1]} (max_grid)"
            )
        return size
    h, w = height / rows, width / columns  # in latents
    if preparation.resize == "stride":
        scale = min(1.0, limits.max_grid / h, limits.max_grid / w)
        grid = max(1, round(h * scale)), max(1, round(w * scale))
    else:
        grid = _bucket(h, w, preparation.max_latents or limits.max_grid**2, limits.max_grid)
    return grid[0] * rows, grid[1] * columns


def _bucket(h: float, w: float, budget: int, largest: int) -> Size:
    """The grid within the budget of smallest |log of the ratio of aspects| + |log of the ratio of areas| / 4."""
    aspect, area = w / h, min(h * w, budget)

    def cost(grid: Size) -> tuple[float, int]:
        off = abs(math.log(grid[1] / grid[0] / aspect)) + abs(math.log(grid[0] * grid[1] / area)) / 4
        return round(off, 9), grid[0] * grid[1]  # rounded, so that ties are equal on every machine

    most = min(largest, budget)
    near = ((rows, w) for rows in range(1, most + 1) for w in (math.floor(rows * aspect), math.ceil(rows * aspect)))
    return min(((rows, max(1, min(columns, largest, budget // rows))) for rows, columns in near), key=cost)


# ------------------------------------------------------------------------------------------------ encoders


class EncoderSizes(Frozen):
    """The sizes in pixels that a picture encoder takes (omni.encoders), after the preparation for the codec.

    multiple: of both sides. fixed: one size for every picture, whose aspect is not kept. Without it, a picture keeps
    its aspect within rounding, and has `min_pixels` to `max_pixels` pixels: the rule of Qwen2-VL (arXiv 2409.12191).
    resample: antialiased, see `resized`.
    """

    multiple: int = Field(ge=1, le=1 << 12)
    fixed: tuple[int, int] | None = None
    min_pixels: int = Field(default=1, ge=1, le=1 << 26)
    max_pixels: int = Field(default=1 << 24, ge=1, le=1 << 26)
    resample: Literal["bicubic", "bilinear"] = "bicubic"

    @model_validator(mode="after")
    def _can_be_met(self) -> EncoderSizes:
        if self.fixed is not None and (min(self.fixed) < 1 or any(side % self.multiple for side in self.fixed)):
            raise ValueError(f"fixed = {list(self.fixed)} must be positive multiples of {self.multiple} pixels")
        if self.fixed is None and not max(self.min_pixels, self.multiple**2) <= self.max_pixels:
            raise ValueError(
                f"max_pixels = {self.max_pixels} is below min_pixels = {self.min_pixels} or one position of "
                f"{self.multiple} x {self.multiple}; raise it"
            )
        return self


def encoder_size(height: int, width: int, sizes: EncoderSizes) -> Size:
    """The size in pixels at which an encoder reads a picture of (height, width). ValueError for a picture 200 times as
    long as wide."""
    if height < 1 or width < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"a picture of {height} x {width} pixels is too long for an encoder: at most {MAX_ASPECT}:1")
    if sizes.fixed is not None:
        return sizes.fixed
    step = sizes.multiple
    rows, columns = (round(side / step) for side in (height, width))
    if rows * columns * step**2 > sizes.max_pixels:
        scale = math.sqrt(height * width / sizes.max_pixels)
        rows, columns = (max(1, math.floor(side / scale / step)) for side in (height, width))
    elif rows * columns * step**2 < sizes.min_pixels:
        scale = math.sqrt(sizes.min_pixels / (height * width))
        rows, columns = (math.ceil(side * scale / step) for side in (height, width))
    return rows * step, columns * step


def resized(pixels: Tensor, size: Size, resample: Literal["bicubic", "bilinear"]) -> Tensor:
    """uint8 (..., H, W, 3) in exactly `size`, its aspect not kept; the same tensor if nothing changes.

    In the 8-bit arithmetic of torch on the CPU, wherever the pixels are, columns first. That is how encoders are
    trained, with PIL, but for one of 255 in under one value of a hundred (bicubic; bilinear: two, in a few of a
    hundred). Pillow 13 resamples rows first where that is faster: then up to three, in a fifth of the values.
    """
    height, width = pixels.shape[-3:-1]
    if (height, width) == size:
        return pixels
    planes = rearrange(pixels.cpu().reshape(-1, height, width, 3), "n h w c -> n c h w")
    planes = F.interpolate(planes, size=size, mode=resample, antialias=True, align_corners=False)
    out = rearrange(planes, "n c h w -> n h w c").reshape(*pixels.shape[:-3], *size, 3)
    return out.contiguous().to(pixels.device)


# ------------------------------------------------------------------------------------------------ pixels


def _to_target_size(pixels: Tensor, preparation: Preparation, limits: Limits) -> Tensor:
    """(..., H, W, 3) in the target size and colour; the same tensor if nothing changes."""
    height, width = pixels.shape[-3:-1]
    size = target_size(height, width, preparation, limits)
    if size != (height, width):
        window = _window(height, width, size)
        lost = 1 - min(window[0] / height, window[1] / width)
        crops = preparation.resize == "crop" or (preparation.resize == "buckets" and lost <= MAX_CROP)
        pixels = _resize(_centre_crop(pixels, window), size) if crops else letterbox(pixels, size)
    return pixels if preparation.colour == "rgb" else _grey(pixels)


def letterbox(pixels: Tensor, size: Size) -> Tensor:
    """uint8 (..., H, W, 3) scaled to fit inside `size` with its aspect, and centred between repeated edges."""
    height, width = pixels.shape[-3:-1]
    scale = min(size[0] / height, size[1] / width)
    inner = max(1, min(size[0], round(height * scale))), max(1, min(size[1], round(width * scale)))
    pixels = _resize(pixels, inner)
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    rows = torch.arange(-top, size[0] - top, device=pixels.device).clamp(0, inner[0] - 1)
    columns = torch.arange(-left, size[1] - left, device=pixels.device).clamp(0, inner[1] - 1)
    return pixels.index_select(-3, rows).index_select(-2, columns)


def _window(height: int, width: int, size: Size) -> Size:
    """The largest window of (height, width) with the aspect of `size`."""
    return (
        max(1, min(height, round(width * size[0] / size[1]))),
        max(1, min(width, round(height * size[1] / size[0]))),
    )


def _centre_crop(pixels: Tensor, size: Size) -> Tensor:
    """The window of `size` in the middle of (..., H, W, 3)."""
    top, left = (pixels.shape[-3] - size[0]) // 2, (pixels.shape[-2] - size[1]) // 2
    return pixels[..., top : top + size[0], left : left + size[1], :]


def _resize(pixels: Tensor, size: Size) -> Tensor:
    """Antialiased bilinear resize of uint8 (..., H, W, 3)."""
    height, width = pixels.shape[-3:-1]
    if (height, width) == size:
        return pixels
    parts = []
    for part in pixels.reshape(-1, height, width, 3).split(max(1, RESIZE_PIXELS // (height * width))):
        part = rearrange(part, "n h w c -> n c h w").float()
        part = F.interpolate(part, size=size, mode="bilinear", antialias=True, align_corners=False)
        parts.append(rearrange(part.round().clamp(0, 255).to(torch.uint8), "n c h w -> n h w c"))
    return torch.cat(parts).reshape(*pixels.shape[:-3], *size, 3)


def _grey(pixels: Tensor) -> Tensor:
    """Luma of (..., H, W, 3) in all three channels; the same tensor if it is grey already."""
    weights = torch.tensor(GREY, dtype=torch.int32, device=pixels.device)
    luma = ((pixels.int() * weights).sum(-1, keepdim=True) + 500) // 1000
    return pixels if bool((luma == pixels).all()) else luma.byte().expand_as(pixels).contiguous()


def _subsampled(num: int, ratio: float) -> list[int]:
    """The indices of the frames, of `num`, at 0, ratio, 2 ratio, ... (ratio > 1)."""
    count = math.ceil(num / ratio - 1e-6)
    return [min(num - 1, math.floor(k * ratio + 1e-6)) for k in range(max(1, count))]


def _check_pixels(pixels: Tensor, ndim: int, what: str, shape: str) -> None:
    """ValueError unless `pixels` are uint8 with `ndim` axes, the last of 3."""
    if pixels.dtype != torch.uint8 or pixels.ndim != ndim or pixels.shape[-1] != 3 or not pixels.numel():
        raise ValueError(f"{what} is prepared from uint8 {shape}, got {pixels.dtype} {tuple(pixels.shape)}")
