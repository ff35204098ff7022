"""What an autoencoder's configuration fixes: the diffusers class, its arguments and the normalisation of latents.

It builds no network: a model reads the stride and the number of channels of its codec here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from omni.codecs.families import FAMILIES, STAGE_LISTS
from omni.config import Frozen, check_depth

_MAX_NUMBER, _MAX_LAYERS, _MAX_ENTRIES = 1 << 16, 256, 1 << 12  # of an argument: a number, a number of layers, a list
NUMBERS_OF_LAYERS = {  # the arguments of the classes below that are one, or a list of them
    *("layers_per_block", "encoder_layers_per_block", "decoder_layers_per_block"),
    *("num_encoder_blocks", "num_decoder_blocks", "num_res_blocks"),
}


ClassName = Literal[
    "AutoencoderKL",
    "AutoencoderKLFlux2",
    "AutoencoderTiny",
    "AutoencoderDC",
    "AutoencoderKLWan",
    "AutoencoderKLQwenImage",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLHunyuanVideo15",
]


class AutoencoderConfig(Frozen):
    """A diffusers class by name and its arguments, and the options of the codec around it.

    Normalised latent = (raw - mean) / deviation, one of each per raw channel, or per channel of a packed position.
    Empty `mean` and `deviation` stand for those of the diffusers configuration (see `statistics_of`).
    Stored as config.json: a new option needs a default under which older codecs compute the same; defaults of OPTIONS
    are not written.
    """

    kind: str = "autoencoder"
    class_name: ClassName
    model: dict[str, Any]
    mean: tuple[float, ...] = ()
    deviation: tuple[Annotated[float, Field(gt=0)], ...] = ()
    patch: int | None = Field(
        default=None,
        ge=1,
        le=8,
        description="p x p raw latents are one position, its channels in the order (row, column, raw channel)",
    )
    frames_per_chunk: int = Field(default=1, ge=1, le=64, description="latent frames of one block of a clip")
    posterior: Literal["mean", "sample"] = Field(
        default="mean", description="sample: one sample of the posterior, keyed by the seed and the pixels"
    )
    posterior_seed: int = Field(default=0, ge=0, lt=1 << 63)
    tile: int | None = Field(
        default=None,
        ge=1,
        le=1 << 14,
        description="pixels: larger media are computed in tiles; exact without group norms",
    )
    overlap: int | None = Field(default=None, ge=0, le=1 << 14, description="pixels around a tile; absent: tile / 4")
    decode_batch: int = Field(default=64, ge=1, le=1 << 10, description="pictures that are decoded in one pass")

    @field_validator("model")
    @classmethod
    def _bounded(cls, model: dict[str, Any]) -> dict[str, Any]:
        """ValueError for what would build networks without end."""
        for name, value in model.items():
            check_depth(value, name)
            _check_argument(name, value)
        for name in ("latent_channels", "z_dim"):
            channels = model.get(name, 1)
            if not isinstance(channels, int) or channels < 1:
                raise ValueError(f"{name} = {channels!r:.80} must be a whole number from 1 on")
        for name in sorted(STAGE_LISTS & model.keys()):
            if not isinstance(model[name], list) or not 1 <= len(model[name]) <= 16:
                raise ValueError(f"{name} = {model[name]!r:.200} is no list of 1 to 16 stages")
        in_time, patch = model.get("temperal_downsample", []), model.get("patch_size")
        if not isinstance(in_time, list) or len(in_time) > 16:
            raise ValueError(f"temperal_downsample = {in_time!r:.200} is no list of up to 16 stages")
        if not isinstance(patch, list) and patch not in (None, *range(1, 9)):
            raise ValueError(f"patch_size = {patch!r:.80} must lie in 1 .. 8")
        return model

    @model_validator(mode="after")
    def _has_effect(self) -> AutoencoderConfig:
        """ValueError for an option that would have no effect."""
        if self.posterior == "sample" and not FAMILIES[self.class_name].posterior:
            raise ValueError(f"posterior = 'sample' has no effect: {self.class_name} has no posterior; leave it out")
        if self.posterior == "mean" and self.posterior_seed:
            raise ValueError(f"posterior_seed = {self.posterior_seed} has no effect without posterior = 'sample'")
        if self.overlap is not None and self.tile is None:
            raise ValueError(f"overlap = {self.overlap} has no effect without a tile; give tile, or leave it out")
        return self

    @property
    def is_self_contained(self) -> bool:
        """Whether the spec and the normalisation are in here, not in the defaults of the diffusers class."""
        known = set(FAMILIES[self.class_name].arguments) <= self.model.keys()
        return bool(known and self.mean and self.deviation)


OPTIONS = ("patch", "frames_per_chunk", "posterior", "posterior_seed", "tile", "overlap", "decode_batch")


def stored_table(config: AutoencoderConfig) -> dict[str, Any]:
    """The configuration as JSON values, without options that have their defaults."""
    table, fields = config.model_dump(mode="json"), type(config).model_fields
    return {name: value for name, value in table.items() if name not in OPTIONS or value != fields[name].default}


def _check_argument(name: str, value: Any) -> None:
    """ValueError for a number, a number of layers or a list beyond its bound; lists and tables are searched."""
    if isinstance(value, list | tuple):
        if len(value) > _MAX_ENTRIES:
            raise ValueError(f"{name} has {len(value)} entries; at most {_MAX_ENTRIES} make sense")
        for item in value:
            _check_argument(name, item)
    elif isinstance(value, dict):
        for item in value.values():
            _check_argument(name, item)
    elif isinstance(value, int) and not isinstance(value, bool):
        largest = _MAX_LAYERS if name in NUMBERS_OF_LAYERS else _MAX_NUMBER
        if not 0 <= value <= largest:
            raise ValueError(f"{name} = {str(value)[:20]} must lie in 0 .. {largest}")


_STATISTICS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def statistics_of(settings: Mapping[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel of raw latents, by the fields of a diffusers configuration.

    As its pipelines decode: raw = z / scaling_factor + shift_factor; with latents_mean and latents_std, which come
    together, raw = z latents_std / scaling_factor + latents_mean. An absent or null factor is 1, a shift 0. ValueError
    for one of the two alone, beside a shift, of another length, or for a deviation that is not a positive number.
    """
    factor, shift, mean, std = (settings.get(name) for name in _STATISTICS)
    for name, value in zip(_STATISTICS, (factor, shift, mean, std), strict=True):
        numbers = value if name.startswith("latents") else [value]
        if value is not None and not (isinstance(numbers, list | tuple) and all(map(_is_number, numbers))):
            raise ValueError(f"{name} = {value!r:.200} is no number, or no list of them")
    scale = 1.0 if factor is None else float(factor)
    if (mean is None) != (std is None):
        raise ValueError("latents_mean and latents_std come together; give both, or neither")
    if mean is None or std is None:
        return (float(shift or 0.0),) * channels, (_divided_by_scale(1.0, scale),) * channels
    if shift:
        raise ValueError(f"shift_factor {shift} and latents_mean are both a mean; leave one of them out")
    return tuple(float(v) for v in mean), tuple(_divided_by_scale(float(v), scale) for v in std)


def _divided_by_scale(std: float, scale: float) -> float:
    """std / scale. ValueError for a scale that is not positive."""
    if not scale > 0:
        raise ValueError(f"scaling_factor = {scale} must be a positive number")
    return std / scale


def checked_statistics(
    mean: Iterable[float], deviation: Iterable[float], channels: int, packed: int
) -> tuple[Tensor, Tensor]:
    """Float32 (C,) each. ValueError unless there is a finite mean and a positive deviation for each raw channel, or for
    each channel of a packed position."""
    means, deviations = torch.tensor(tuple(mean)), torch.tensor(tuple(deviation))
    if len(means) != len(deviations) or len(means) not in (channels, packed):
        raise ValueError(
            f"mean and deviation have {len(means)} and {len(deviations)} values for {channels} channels; "
            "give one of each per channel, or neither"
        )
    for name, values, right in (
        ("mean", means, means.isfinite()),
        ("deviation", deviations, deviations.isfinite() & (deviations > 0) & deviations.reciprocal().isfinite()),
    ):
        if not right.all():
            wrong = int((~right).nonzero()[0])
            raise ValueError(f"the {name} of channel {wrong} is {values[wrong].item()}; it cannot normalise latents")
    return means, deviations


def shortest_decimals(values: Tensor) -> tuple[float, ...]:
    """Numbers of as few digits as give these float32 values again."""
    return tuple(float(str(np.float32(v))) for v in values.tolist())
