"""Encoder: the one face of everything that turns pictures into features; its registry and its files.

Shapes: B pictures, H and W pixels, h and w feature rows and columns, E features of a position. Pixels are uint8 RGB,
channels last; features are channels last, as the tower computes them, not normalised. An encoder resizes pictures
itself, by omni.media.preparation. This file builds no network.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from omni.checkpoint import publish
from omni.config import Frozen
from omni.errors import require_finite
from omni.media.preparation import EncoderSizes, encoder_size, resized
from omni.registry import Registry

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
RESTORE_HINT = "its weights are damaged: restore its files, and check them with `omni verify`"


class EncoderSpec(Frozen):
    """What the model must know of an encoder, without its network.

    width: features of one position. patch: pixels of a patch along a side. merge: patches along a side that one
    position of features stands for. sizes: the sizes in pixels that it takes.
    """

    name: str
    width: int
    patch: int
    merge: int = 1
    sizes: EncoderSizes

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Feature rows and columns of a picture of (height, width) pixels, which is resized first. ValueError for a
        shape that no size of the encoder fits."""
        size, step = encoder_size(height, width, self.sizes), self.patch * self.merge
        return size[0] // step, size[1] // step

    def num_features(self, height: int, width: int) -> int:
        """Positions of the features of a picture of (height, width) pixels."""
        rows, columns = self.grid(height, width)
        return rows * columns

    def prepared(self, pixels: Tensor) -> Tensor:
        """uint8 (..., H, W, 3) of any size -> in the size that the encoder reads; the same tensor if that is its
        own."""
        height, width = pixels.shape[-3:-1]
        return resized(pixels, encoder_size(height, width, self.sizes), self.sizes.resample)


class Encoder(ABC):
    """Pictures to features. Subclasses give `_encode`."""

    spec: EncoderSpec

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) of any size -> (B, h, w, E) of `spec.grid`, on the device of `pixels`; float32, or float64
        if the weights are. ValueError for another type or shape; NotFiniteError if the tower gives NaN or infinity.

        Pictures go through the tower one by one: the features of a picture are the same bits whatever else is in the
        batch.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or not pixels.numel():
            raise ValueError(f"encode takes uint8 pixels (B, H, W, 3), got {pixels.dtype} {tuple(pixels.shape)}")
        features = torch.cat([self._encode(one) for one in self.spec.prepared(pixels).split(1)])
        features = features.to(pixels.device, torch.promote_types(features.dtype, torch.float32))
        require_finite(features, f"the features that encoder {self.spec.name!r} makes", RESTORE_HINT)
        return features

    def features_of(self, pictures: Sequence[Tensor]) -> Tensor:
        """Pictures uint8 (H, W, 3), each as `EncoderSpec.prepared` gives it -> their features (F, E), one by one, on
        the device and in the dtype of the weights. With a graph, where the weights have gradients (`trainable`)."""
        return torch.cat([self._encode(one[None]).flatten(0, 2) for one in pictures])

    def trainable(self) -> nn.Module:
        """The network, whose weights have gradients from now on; what the encoder computes follows them. ValueError for
        an encoder without one."""
        raise ValueError(f"encoder {self.spec.name!r} has no network to train; leave out tune_encoder")

    @abstractmethod
    def _encode(self, pixels: Tensor) -> Tensor:
        """One picture uint8 (1, H, W, 3) of a size of the spec -> (1, h, w, E), on the device of the weights."""

    # ---------------------------------------------------------------------------------------------- files

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON-serialisable; with `kind`, the name in the registry, and without weights."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Named tensors to store."""

    @classmethod
    @abstractmethod
    def restored(cls, config: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> Self:
        """An encoder with the weights that were saved with it. ValueError names `source`."""

    def files(self) -> dict[str, Any]:
        """What an encoder directory holds, as `omni.checkpoint.publish` takes it."""
        return {CONFIG_FILE: json.dumps(self.config(), indent=1) + "\n", WEIGHTS_FILE: self.weights()}

    def save(self, directory: str | Path, replace: bool = False) -> Path:
        """Publish the encoder as a directory with a manifest of digests."""
        return publish(directory, self.files(), info={"encoder": self.spec.name}, replace=replace)

    def to(self, device: torch.device | str) -> Self:
        """Move the weights; returns self."""
        return self


encoders: Registry[type[Encoder]] = Registry("encoder", "omni.encoders", entry_points="omni.encoders")
