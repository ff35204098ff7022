"""Encoders whose network is a vision tower of transformers. The network is built when it is first needed: what a model
must know of it is in its configuration.

Weights are stored as they came: under the tower's own names, in their own dtypes. They are loaded here, strictly, and
not by transformers. Shapes: pixels (1, H, W, 3), values (1, 3, H, W), features (1, h, w, E).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from omni.config import Frozen, build
from omni.encoders.encoder import Encoder
from omni.encoders.published import preparation_of, settings_in, tensors_below
from omni.encoders.upstream import settings_of, tower_classes
from omni.errors import DamagedError
from omni.weights import load_weights, unallocated

Length = Annotated[int, Field(ge=1, le=1 << 16)]
Layers = Annotated[int, Field(ge=1, le=256)]
Deviation = Annotated[float, Field(gt=0, le=1e3)]
Activation = Literal["gelu", "gelu_pytorch_tanh", "silu", "quick_gelu"]


class Tower(Frozen):
    """The settings of a tower that decide its weights and what it computes, under their names in transformers."""


class TowerConfig(Frozen):
    """A tower and its pixels: value = (pixel / 255 - mean) / std, per channel. Sizes in pixels as
    media.preparation.EncoderSizes; `min_pixels` and `max_pixels` have no effect at a fixed size."""

    kind: str
    mean: tuple[float, float, float]
    std: tuple[Deviation, Deviation, Deviation]
    min_pixels: int = Field(default=1, ge=1, le=1 << 26)
    max_pixels: int = Field(default=1 << 20, ge=1, le=1 << 26)
    resample: Literal["bicubic", "bilinear"] = "bicubic"


class TowerEncoder(Encoder):
    """Subclasses give the type of their configuration, and what the tower reads and returns."""

    configuration_type: ClassVar[type[TowerConfig]]
    tower_type: ClassVar[type[Tower]]
    prefixes: ClassVar[tuple[str, ...]]  # of the tower's names in checkpoints; the first that occurs counts
    parts: ClassVar[tuple[str, ...]]  # of the tower that features depend on
    depth: ClassVar[str]  # the setting that counts the layers

    def __init__(self, config: TowerConfig) -> None:
        """The network is unset: `load_weights` comes next."""
        self.configuration: Any = config
        self._module: nn.Module | None = None
        self._weights: tuple[Mapping[str, Tensor], str] = ({}, "encoder")
        self._dtypes: dict[str, torch.dtype] = {}
        self._device = torch.device("cpu")

    # ---------------------------------------------------------------------------------------- construction

    @classmethod
    def from_transformers(cls, directory: str | Path, **options: Any) -> Self:
        """The vision tower of a local transformers checkpoint: config.json, safetensors, preprocessor_config.json.

        options: fields of the configuration that replace or complete the files'. ValueError for a checkpoint of another
        kind, a setting of the tower that is not served, and a missing preparation; DamagedError for damaged weights.
        """
        folder = Path(directory)
        known, kind = cls.tower_type.model_fields.keys(), cls.configuration_type.model_fields["kind"].default
        given = settings_in(folder, kind)
        unserved = (settings_of(kind) & given.keys()) - known - cls.without_effect
        cls.check_settings(given, str(folder))
        if unserved:
            raise ValueError(
                f"{folder}: this kind of encoder does not serve the tower's setting {sorted(unserved)[0]!r}"
            )
        tower = {name: value for name, value in given.items() if name in known}
        fields = {"tower": tower, **preparation_of(folder, options), **options}
        encoder = cls(build(fields, cls.configuration_type, str(folder)))
        tensors = tensors_below(folder, cls.prefixes, cls.parts)
        encoder.load_weights(encoder.used(tensors), str(folder))
        return encoder

    without_effect: ClassVar[frozenset[str]] = frozenset()  # settings that change nothing of features

    @classmethod
    def check_settings(cls, given: Mapping[str, Any], source: str) -> None:
        """ValueError for a setting in `without_effect` of a value that has one."""

    def used(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of a checkpoint that the configuration needs."""
        return tensors

    @classmethod
    def restored(cls, config: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> Self:
        encoder = cls(build(config, cls.configuration_type, source))
        encoder.load_weights(weights, source)
        return encoder

    def load_weights(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Take the weights of the tower, which is built when it is first needed. DamagedError for none at all."""
        if not tensors:
            raise DamagedError(f"{source}: the encoder has no weights")
        self._weights, self._module = (tensors, source), None
        self._dtypes = {name: value.dtype for name, value in tensors.items()}

    # -------------------------------------------------------------------------------------------- network

    @property
    def module(self) -> Any:
        """The tower, in evaluation mode. DamagedError if the weights do not fit the configuration."""
        if self._module is None:
            self._module = self._loaded().eval().requires_grad_(False).to(self._device)
            self._weights = ({}, "encoder")
        return self._module

    def trainable(self) -> nn.Module:
        return self.module.requires_grad_(True)

    def _loaded(self) -> nn.Module:
        """A new tower with the weights that were kept for it."""
        tensors, source = self._weights
        settings = self.configuration.tower.model_dump(mode="json")
        with unallocated():
            module = self.built(settings)
        load_weights(module, named_as(tensors, module.state_dict()), source)
        shallow = dict(self.built(self.shallow(settings)).named_buffers())  # computed constants have no stored values
        for name, value in module.named_buffers():
            if value.is_meta:
                owner, _, last = name.rpartition(".")
                setattr(module.get_submodule(owner), last, shallow[name].clone())
        return module.float()

    def built(self, settings: Mapping[str, Any]) -> nn.Module:
        """The tower of transformers with these settings, its weights unset. ValueError for impossible settings."""
        configuration, tower = tower_classes(self.configuration.kind)
        try:
            return tower(configuration(**{**settings, **self.fixed_settings}))
        except Exception as error:  # the class checks its settings in its own way
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{self.configuration.kind} cannot be built of these settings ({reason:.200})") from None

    fixed_settings: ClassVar[Mapping[str, Any]] = {}

    def shallow(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of the same tower with one layer."""
        return {**settings, self.depth: 1}

    def _encode(self, pixels: Tensor) -> Tensor:
        values = pixel_values(pixels, self.configuration.mean, self.configuration.std).to(self._device)
        rows, columns = self.spec.grid(*pixels.shape[1:3])
        dtype = next(self.module.parameters()).dtype
        return self.features(values.to(dtype)).view(1, rows, columns, self.spec.width)

    @abstractmethod
    def features(self, values: Tensor) -> Tensor:
        """values (1, 3, H, W) in the dtype of the tower -> h w rows of features, in row-major order."""

    # ---------------------------------------------------------------------------------------------- files

    def config(self) -> dict[str, Any]:
        return self.configuration.model_dump(mode="json")

    def weights(self) -> dict[str, Tensor]:
        """In the dtypes that they came in."""
        kept = self._weights[0] if self._module is None else self._module.state_dict()
        kept = {name.removeprefix("vision_model."): value for name, value in kept.items()}
        return {name: value.detach().cpu().to(self._dtypes.get(name, value.dtype)) for name, value in kept.items()}

    def to(self, device: torch.device | str) -> Self:
        self._device = torch.device(device)
        if self._module is not None:
            self._module.to(device)
        return self


def pixel_values(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W). In the arithmetic of transformers' image processors without
    torchvision, so equal to them in every bit."""
    scaled = (pixels.cpu().double() * (1 / 255)).float()  # not every device has float64
    shift, scale = (torch.tensor(tuple(values), dtype=torch.float32) for values in (mean, std))
    return rearrange((scaled - shift) / scale, "b h w c -> b c h w").contiguous().to(pixels.device)


def named_as(tensors: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """The tensors under the names of this version of transformers, some of which put one more prefix before them."""
    first = {name.partition(".")[0] for name in own}
    [prefix] = first if len(first) == 1 else [""]
    return {(f"{prefix}.{name}" if prefix else name): value for name, value in tensors.items()}
