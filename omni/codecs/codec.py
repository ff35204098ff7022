"""Codec: the one face of everything that turns media into latent blocks and back; its registry and its files.

Shapes: B pictures, T frames, H and W pixels, h and w latent rows and columns, t latent frames of a chunk, C latent
channels. Media are uint8 RGB, channels last; latents are float32, channels last, about zero mean and unit deviation
per channel. Normalisation happens in codecs and nowhere else. This file builds no network: autoencoders.py, fsq.py and
pixels.py do.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from omni.checkpoint import publish
from omni.config import Frozen
from omni.document import Image, Video
from omni.errors import require_finite
from omni.registry import Registry

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MAX_GRID = 64  # latent rows or columns that the size header of a document can name; equals tokenizer.MAX_SIZE
MAX_LATENT = 1e4  # standard deviations: no picture has such a latent, and no sound model draws one
RESTORE_HINT = "its weights are damaged: restore its files, and check them with `omni verify`"


class CodecSpec(Frozen):
    """What the model must know of a codec.

    channels: numbers per latent position. stride: media pixels per latent along (time, rows, columns).
    frames_per_chunk: latent frames of one block of a clip, the same for every block. causal: a chunk does not depend on
    later frames. single_first_frame: the first latent frame of a clip is of one media frame, and each later one of
    stride[0]; so a picture is a clip of one latent frame, and a clip of n blocks has `media_frames(n)` frames.
    """

    name: str
    channels: int
    stride: tuple[int, int, int]
    frames_per_chunk: int = 1
    causal: bool = True
    single_first_frame: bool = False

    @property
    def media_frames_per_chunk(self) -> int:
        """Frames of a clip that one chunk holds; the first chunk lacks `missing_frames` of them."""
        return self.frames_per_chunk * self.stride[0]

    @property
    def missing_frames(self) -> int:
        """Frames that the first chunk of a clip has fewer than the others."""
        return self.stride[0] - 1 if self.single_first_frame else 0

    def media_frames(self, num_chunks: int) -> int:
        """Frames of a clip of so many chunks."""
        return num_chunks * self.media_frames_per_chunk - self.missing_frames


def _quietly(what: str) -> AbstractContextManager[None]:
    """The default of `Codec.announce`: prints nothing."""
    return nullcontext()


class Codec(ABC):
    """Pictures and clips to normalised latents and back. Subclasses give `_encode` and `_decode` of pictures."""

    spec: CodecSpec
    announce: Callable[[str], AbstractContextManager[None]] = staticmethod(_quietly)
    """Entered with the name of what is built, where that may take a while (the command line sets it)."""

    # ------------------------------------------------------------------------------------------- pictures

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Latent rows and columns of a picture of (height, width) pixels. ValueError unless multiples of the stride."""
        _, rows, columns = self.spec.stride
        if height < 1 or width < 1 or height % rows or width % columns:
            raise ValueError(
                f"a picture of {height} x {width} pixels is no multiple of the codec's stride {rows} x {columns}; "
                "omni.media.preparation.prepare_picture makes it one"
            )
        grid = height // rows, width // columns
        if max(grid) > MAX_GRID:
            raise ValueError(
                f"a picture of {height} x {width} pixels is too large: at most {MAX_GRID * rows} x "
                f"{MAX_GRID * columns} with this codec; omni.media.preparation.prepare_picture makes it smaller"
            )
        return grid

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> float32 (B, h, w, C), normalised. ValueError on another type, shape or size;
        NotFiniteError if the codec gives NaN or infinity.

        The latents of a picture are the same bits whatever else is in the batch.
        """
        return self._checked(pixels, self._encode)

    def _checked(self, pixels: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """The latents of pictures, or of the frames of a clip, checked before and after."""
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ValueError(f"encode takes uint8 pixels (B, H, W, 3), got {pixels.dtype} {tuple(pixels.shape)}")
        self.grid(*pixels.shape[1:3])
        latents = compute(pixels)
        require_finite(latents, f"the latents that codec {self.spec.name!r} makes", RESTORE_HINT)
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised float (B, h, w, C) -> uint8 (B, H, W, 3). ValueError on another shape; NotFiniteError for latents
        that are NaN, infinite or beyond MAX_LATENT, or if the codec makes such pixels of others."""
        self._check_latents(latents)
        return self._decode(latents.float())

    def _check_latents(self, latents: Tensor) -> None:
        """The errors of `decode`."""
        if latents.ndim != 4 or latents.shape[-1] != self.spec.channels or not latents.is_floating_point():
            got = f"{latents.dtype} {tuple(latents.shape)}"
            raise ValueError(f"decode takes float latents (B, h, w, {self.spec.channels}), got {got}")
        way_out = "those of pictures have mean 0 and deviation 1: give latents of this codec"
        require_finite(latents, f"the latents given to codec {self.spec.name!r}", way_out, MAX_LATENT)

    @abstractmethod
    def _encode(self, pixels: Tensor) -> Tensor:
        """`encode` of checked pixels, on their device. The latents of a picture must not depend on the batch."""

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor:
        """`decode` of checked float32 latents, on their device."""

    # ---------------------------------------------------------------------------------------------- clips

    def num_chunks(self, num_frames: int) -> int:
        """Chunks of a clip. ValueError unless the frames fill whole chunks."""
        per_chunk, missing = self.spec.media_frames_per_chunk, self.spec.missing_frames
        if num_frames < 1 or (num_frames + missing) % per_chunk:
            first = f", the first of {per_chunk - missing}" if missing else ""
            raise ValueError(
                f"a clip of {num_frames} frames does not fill chunks of {per_chunk} frames{first}; cut it or repeat "
                "its last"
            )
        return (num_frames + missing) // per_chunk

    @torch.no_grad()
    def encode_video(self, frames: Tensor) -> list[Tensor]:
        """uint8 (T, H, W, 3) -> one float32 (frames_per_chunk, h, w, C) per chunk, T = spec.media_frames(chunks).

        ValueError for another number of frames, and as `encode` raises it.
        """
        count = self.num_chunks(len(frames))
        return list(self._checked(frames, self._encode_clip).chunk(count))

    @torch.no_grad()
    def decode_video(self, chunks: Sequence[Tensor]) -> Tensor:
        """Inverse of `encode_video`: chunks (t, h, w, C) -> uint8 (T, H, W, 3). Errors as of `decode`."""
        if not chunks:
            raise ValueError("decode_video takes at least one chunk, got none")
        for chunk in chunks:
            self._check_latents(chunk)
        return self._decode_clip([chunk.float() for chunk in chunks])

    def _encode_clip(self, frames: Tensor) -> Tensor:
        """Checked frames (T, H, W, 3) -> latents (t, h, w, C) of the whole clip. Here: frame by frame."""
        assert self.spec.stride[0] == 1, "a codec that compresses time overrides _encode_clip and _decode_clip"
        return self._encode(frames)

    def _decode_clip(self, chunks: Sequence[Tensor]) -> Tensor:
        """Checked float32 chunks (t, h, w, C) -> uint8 (T, H, W, 3). Here: chunk by chunk."""
        return torch.cat([self._decode(chunk) for chunk in chunks])

    def num_latents(self, shape: Sequence[int]) -> int:
        """How many latents encoding media of a shape gives, (H, W, 3) or (T, H, W, 3). ValueError as `grid` and
        `num_chunks` raise it."""
        rows, columns = self.grid(*shape[-3:-1])
        return rows * columns * (1 if len(shape) == 3 else self.num_chunks(shape[0]) * self.spec.frames_per_chunk)

    # -------------------------------------------------------------------------------------------- segments

    def encode_media(self, segments: Sequence[Image | Video]) -> list[list[Tensor]]:
        """Float32 blocks (t, h, w, C) of each segment: one of a picture, one per chunk of a clip. ValueError for a size
        that is not prepared (see omni.media.preparation). Pictures of one size share passes."""
        out = [[] if isinstance(s, Image) else self.encode_video(s.frames) for s in segments]
        by_size: dict[torch.Size, list[tuple[int, Tensor]]] = {}
        for index, segment in enumerate(segments):
            if isinstance(segment, Image):
                by_size.setdefault(segment.pixels.shape, []).append((index, segment.pixels))
        for group in by_size.values():
            latents = self.encode(torch.stack([pixels for _, pixels in group]))
            for (index, _), one in zip(group, latents, strict=True):
                out[index] = [one.unsqueeze(0)]
        return out

    # ---------------------------------------------------------------------------------------------- files

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON-serialisable; with `kind`, the name in the registry, and without weights."""

    def weights(self) -> dict[str, Tensor]:
        """Named tensors to store; empty for a codec without weights."""
        return {}

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> Self:
        """A codec with unset weights from what `config` returned. ValueError names `source`."""

    @classmethod
    def restored(cls, config: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> Self:
        """A codec with the weights that were saved with it. ValueError names `source`."""
        codec = cls.from_config(config, source)
        codec.load_weights(weights, source)
        return codec

    def load_weights(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Take the tensors of `weights`. ValueError (naming `source`) when names or shapes differ."""
        if tensors:
            raise ValueError(f"{source}: codec {self.spec.name!r} has no weights, the file has {len(tensors)}")

    def files(self) -> dict[str, Any]:
        """What a codec directory holds, as `omni.checkpoint.publish` takes it."""
        files: dict[str, Any] = {CONFIG_FILE: json.dumps(self.config(), indent=1) + "\n"}
        if weights := self.weights():
            files[WEIGHTS_FILE] = weights
        return files

    def save(self, directory: str | Path, replace: bool = False) -> Path:
        """Publish the codec as a directory with a manifest of digests."""
        return publish(directory, self.files(), info={"codec": self.spec.name}, replace=replace)

    def to(self, device: torch.device | str) -> Self:
        """Move the weights; returns self."""
        return self


codecs: Registry[type[Codec]] = Registry("codec", "omni.codecs", entry_points="omni.codecs")


def to_bytes(pictures: Tensor) -> Tensor:
    """Float pixels in [-1, 1], of any shape -> uint8, rounded and clipped. NotFiniteError for NaN and infinity."""
    require_finite(pictures, "the pixels that the codec decodes", RESTORE_HINT)
    return ((pictures.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def psnr(reference: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of uint8 pictures (B, H, W, 3), in dB: float32 (B,). Equal pictures give infinity."""
    error = (reference.float() - other.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(255.0**2 / error)
